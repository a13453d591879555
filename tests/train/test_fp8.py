"""Training in FP8: near bf16, resumed to the last bit, recomputed and compiled to the same bits, honestly counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megalite.config import RecomputeConfig, RunConfig
from megalite.config_values import from_dict
from megalite.errors import ExitCode, UserError
from megalite.layers.linear import use_fp8
from megalite.models.presets import preset
from megalite.parallel.mesh import Mesh
from megalite.train import flops
from megalite.train.flops import Peak, Precision, choose_precision, flops_per_token, peak_flops
from megalite.train.run import run_pretraining
from megalite.train.runlog import read_records
from megalite.train.verify import Verification
from megalite.train.verify_layouts import all_layouts
from tests.helpers.tiny import cheap_surroundings, make_dataset, read_losses, tiny_config, tiny_values
from tests.models.test_transformer import CONFIGS, make, packed_run, random_tokens, replace_other_documents

CPU = Mesh(device=torch.device("cpu"))
Scaling = Literal["rowwise", "tensorwise"]
SCALINGS: list[Scaling] = ["rowwise", "tensorwise"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with cheap_surroundings():
        yield


def train(dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[int, float]:
    """Losses of a tiny run."""
    quiet = {"interval": 0, "samples": 0, "max_tokens": 64}
    recompute = sections.pop("recompute", {})
    config = tiny_config(dataset, run_dir, **{"eval": quiet, **sections})
    config = dataclasses.replace(config, recompute=RecomputeConfig(**recompute))
    assert run_pretraining(config, CPU, command="test", config_toml=lambda config: "").code is ExitCode.DONE
    return read_losses(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_losses_stay_near_those_of_bf16(dataset: Path, tmp_path: Path, scaling: Scaling) -> None:
    """60 steps from the same weights on the same data, to less than two thirds of the first loss: within 2 % at every
    step. An FP8 product's own error is 4 %, and independent from element to element."""
    losses = {
        precision: train(
            dataset,
            tmp_path / precision,
            train={"precision": precision, "fp8_scaling": scaling, "steps": 60},
            checkpoint={"interval": 0},
        )
        for precision in ("bf16", "fp8")
    }
    for step, expected in losses["bf16"].items():
        assert losses["fp8"][step] == pytest.approx(expected, rel=0.02), step
    assert losses["fp8"][60] < 0.66 * losses["fp8"][1]
    assert losses["fp8"] != losses["bf16"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_resumed_run_repeats_every_bit(dataset: Path, tmp_path: Path, scaling: Scaling) -> None:
    constant = {"kind": "constant", "warmup": 1}
    values: dict[str, Any] = {"precision": "fp8", "fp8_scaling": scaling, "global_batch_size": 4}
    for steps in (3, 6):
        resumed = train(dataset, tmp_path / "run", train={**values, "steps": steps}, schedule=constant)
    whole = train(dataset, tmp_path / "other", train={**values, "steps": 6}, schedule=constant)
    assert resumed == whole
    record = read_records(tmp_path / "run/metrics.jsonl")[-1]
    # Emulated: nothing has an FP8 peak here, so all products are held to the bf16 one.
    assert record["mfu_causal"] == pytest.approx(record["mfu_bf16_equivalent_causal"])


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_bit(dataset: Path, tmp_path: Path, kind: str) -> None:
    values = {"precision": "fp8", "steps": 2, "global_batch_size": 2}
    kept = train(dataset, tmp_path / "kept", train=values)
    again = train(dataset, tmp_path / "again", train=values, recompute={"kind": kind})
    assert kept == again


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_documents_do_not_leak_with_row_scales(name: str) -> None:
    """Replacing the other documents' tokens changes no bit of a document's output, loss or gradients."""
    model = make(CONFIGS[name], torch.bfloat16)
    use_fp8(model, "rowwise")
    tokens = random_tokens(41)
    hidden, loss, grads = packed_run(model, tokens)
    hidden_after, loss_after, grads_after = packed_run(model, replace_other_documents(tokens))
    assert torch.equal(hidden[14:34], hidden_after[14:34])
    assert not torch.equal(hidden[:13], hidden_after[:13])
    assert torch.equal(loss, loss_after)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_after, strict=True))
    use_fp8(model, None)
    assert not torch.equal(packed_run(model, tokens)[0], hidden)


def test_the_loss_compiles_into_one_graph() -> None:
    model = make(dataclasses.replace(CONFIGS["llama"], num_layers=1))
    use_fp8(model, "rowwise")
    tokens = random_tokens(2, 16)

    def run(loss: Any) -> list[Tensor]:
        model.zero_grad()
        value = loss(tokens, tokens)
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    torch.compiler.reset()
    compiled = run(torch.compile(model.loss, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, run(model.loss), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp8-rowwise", "fp8-tensorwise"])
def test_verify_checks_the_runs_type(dtype: str) -> None:
    verification = Verification(preset("tiny"), all_layouts(2), dtype)
    result = verification.one_process()
    assert result.status == "equal"
    assert list(result.checks) == ["float64", dtype]
    assert 0.01 < result.checks[dtype].worst("gradient")[0].relative < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"ffn_hidden_size": 40}},
            r"model.ffn_hidden_size / parallel.tp=1 = 40 must be a multiple of 16 with train.precision='fp8'",
        ),
        (
            {"model": {"hidden_size": 24, "qk_norm": False}},
            r"model.hidden_size = 24 must be a multiple of 16",
        ),
        (
            {"train": {"seq_length": 20}},
            r"train.micro_batch_size · train.seq_length / parallel.cp=1 = 40 must be",
        ),
        (
            {"model": {"ffn_hidden_size": 64}, "parallel": {"tp": 2, "tp_chunks": 2}},
            r"parallel.tp_chunks=2: FP8 products are not cut, set it to 1",
        ),
    ],
)
def test_sizes_that_fp8_units_do_not_take(dataset: Path, changes: dict[str, Any], message: str) -> None:
    values = tiny_values(dataset, Path("unused"))
    values["train"]["precision"] = "fp8"
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    config = from_dict(RunConfig, values)
    with pytest.raises(UserError, match=message):
        config.validate_fp8()
    values["train"]["precision"] = "bf16"
    from_dict(RunConfig, values).validate_fp8()


def test_fp8_is_emulated_on_cpus_and_refused_on_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = choose_precision("fp8", torch.device("cpu"))
    assert (precision.chosen, precision.dtype) == ("fp8", torch.bfloat16)
    assert "emulated on this CPU, slower than bf16" in precision.reason
    assert precision.gemm_fp8_tflops == 0
    reason = "NVIDIA A100 has compute capability 8.0: FP8 tensor cores start at 8.9"
    monkeypatch.setattr(flops, "lacks_fp8", lambda device: reason)
    with pytest.raises(UserError, match=r"does not run here: NVIDIA A100 .* Take train.precision='bf16'"):
        choose_precision("fp8", torch.device("cuda"))


def test_each_product_is_held_to_the_peak_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU = (FLOPs_fp8 / peak_fp8 + FLOPs_bf16 / peak_bf16) / time, worked out for a model by hand."""
    model, peak = preset("llama3-8b"), Peak(main=1000.0, fp8=2000.0)
    plain, rowwise, tensorwise = (
        flops_per_token(model, 8192, fp8) for fp8 in (None, "rowwise", "tensorwise")
    )
    blocks = sum(plain.terms[name] for name in ("attention_qkv", "attention_output", "mlp"))
    assert (plain.fp8, tensorwise.fp8) == (0.0, blocks)
    assert rowwise.fp8 == pytest.approx(blocks * 2 / 3)
    assert plain.mixed_peak(plain.full, peak) == pytest.approx(1000)
    for counted in (rowwise, tensorwise):
        for total in (counted.full, counted.causal):
            seconds = counted.fp8 / 2000 + (total - counted.fp8) / 1000
            assert total / counted.mixed_peak(total, peak) == pytest.approx(seconds)
            assert 1000 < counted.mixed_peak(total, peak) < 2000
    measured = Precision("fp8", "fp8", "", 50.0, 700.0, 1300.0)
    assert peak_flops(measured, torch.device("cpu")) == Peak(700e12, 1300e12)
    emulated = dataclasses.replace(measured, gemm_fp8_tflops=0.0)
    assert peak_flops(emulated, torch.device("cpu")) == Peak(700e12, 700e12)
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(measured, torch.device("cuda")) == Peak(989.4e12, 1978.9e12)
    assert peak_flops(emulated, torch.device("cuda")) == Peak(989.4e12, 989.4e12)
