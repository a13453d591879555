"""Modules, contracts, the timer and the accuracy check that the package exports."""

from __future__ import annotations

import time

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.cases import CASES
from megalite_kernels.cases.checking import check_case, results
from megalite_kernels.contract import CONTRACTS
from megalite_kernels.nn import LayerNorm, LinearCrossEntropy, RMSNorm, SwiGLU
from megalite_kernels.testing import assert_as_accurate
from megalite_kernels.timing import measure
from tests.ops.catalogue import DEVICE, random


def test_norm_modules_take_torchs_weights() -> None:
    x = random(5, 16)
    for ours, theirs in (
        (RMSNorm(16, 1e-6), torch.nn.RMSNorm(16, 1e-6)),
        (LayerNorm(16), torch.nn.LayerNorm(16)),
    ):
        torch.nn.init.normal_(theirs.weight)  # type: ignore[arg-type]
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))


def test_zero_centered_module_starts_as_the_identity_gain() -> None:
    x = random(5, 16)
    torch.testing.assert_close(RMSNorm(16, zero_centered=True)(x), RMSNorm(16)(x))


def test_swiglu_module() -> None:
    mlp, x = SwiGLU(8, 12), random(3, 8)
    gate, up = mlp.gate_up(x).chunk(2, -1)
    torch.testing.assert_close(mlp(x), mlp.down(torch.nn.functional.silu(gate) * up))


def test_loss_module() -> None:
    head, x, target = LinearCrossEntropy(8, 20, reduction="sum"), random(3, 8), torch.tensor([1, -100, 19])
    expected = torch.nn.functional.cross_entropy(x @ head.weight.t(), target, reduction="sum")
    torch.testing.assert_close(head(x, target), expected)


def test_every_public_op_has_a_contract_and_a_case() -> None:
    assert set(CONTRACTS) == set(mk.__all__) - {"use_backend", "explain", "patch", "patched", "unpatch"}
    assert all(contract.cases for contract in CONTRACTS.values())
    assert {case.op for case in CASES.values()} == set(CONTRACTS)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", CASES)
def test_a_case_keeps_its_contract(name: str, backend: str | None) -> None:
    case = CASES[name]
    for dtype in case.dtypes:
        found = check_case(case, dtype, DEVICE, backend=backend)
        assert all(one.kept for one in found.values()), found
        assert any(one.startswith("grad") for one in found) or not case.grads or case.written


@pytest.mark.parametrize("name", CASES)
def test_a_case_counts_its_work(name: str) -> None:
    """Bytes are at least those of inputs, outputs and gradients, each once, and at most 1.2 times those."""
    case = CASES[name]
    inputs = case.make(case.check, torch.Generator(DEVICE).manual_seed(0)).to(torch.float32)
    work = case.work(case.check, 4)
    assert work.forward_flops > 0
    assert (work.backward_bytes > 0) == case.grads
    if case.bound == "memory" and case.op != "embedding":  # that one reads the rows that it needs
        outputs = [tensor for name, tensor in results(case, case.plain, inputs) if name.startswith("out")]
        written = [inputs.all[place] for place in case.written]
        moved = sum(x.numel() * x.element_size() for x in [*inputs.all, *outputs, *written])
        assert 0.8 * moved <= work.forward_bytes <= 1.2 * moved, moved


def test_accuracy_check_fails_on_wrong_numbers() -> None:
    truth = random(100).double()
    good = truth.float()
    assert_as_accurate(good, good, truth)
    with pytest.raises(AssertionError, match=r"loss: error .* is over"):
        assert_as_accurate(good + 1e-5, good, truth, name="loss")
    with pytest.raises(AssertionError, match=r"not finite where the truth is"):
        assert_as_accurate(torch.where(good > 2, torch.inf, good), good, truth)
    with pytest.raises(AssertionError, match=r"dtype torch.bfloat16, expected torch.float32"):
        assert_as_accurate(good.bfloat16(), good, truth)


def test_timer_takes_turns_and_finds_the_slower() -> None:
    def spin(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    timings = measure({"short": lambda: spin(0.001), "long": lambda: spin(0.004)}, rounds=3)
    assert 0.9 < timings["short"].best_ms <= timings["short"].median_ms < timings["long"].best_ms
    with pytest.raises(ValueError, match=r"rounds=0 of 1 variants"):
        measure({"short": lambda: None}, rounds=0)
