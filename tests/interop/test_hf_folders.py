"""Folders written and read: same tensors, no key missing or unexpected, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalite.cli.main import main
from megalite.errors import StorageError, UserError
from megalite.interop.hf import (
    config_from_hf,
    copy_folder,
    export_folder,
    find_folder,
    folder_texts,
    load_folder,
    load_pieces,
    model_pieces,
    read_config_json,
    read_pieces,
)
from megalite.models.transformer import Transformer
from megalite.parallel.random import initialize
from tests.interop.hf_models import CASES, build, save


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("name", CASES)
def test_import_then_export_gives_identical_tensors(name, tmp_path, capsys):
    source = save(name, tmp_path / "theirs")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["folder"] == str(tmp_path / "again")
    assert_identical(tensors_of(source), tensors_of(tmp_path / "again"))
    reread = config_from_hf(read_config_json(tmp_path / "again"))
    assert reread == config_from_hf(read_config_json(source))


@pytest.mark.parametrize("name", CASES)
def test_our_random_model_loads_in_transformers_key_for_key(name, tmp_path):
    config = config_from_hf(build(name).config.to_dict())
    ours = Transformer(config)
    initialize(ours, seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter[: config.vocab_size].add_(0.05 * torch.randn_like(parameter[: config.vocab_size]))
    export_folder(tmp_path / "out", config, model_pieces(ours), texts=folder_texts(config))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert type(theirs).__name__ == type(build(name)).__name__
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[kind], kind
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=2e-5)


def test_saving_again_by_transformers_keeps_our_tensors(tmp_path):
    source = save("qwen3-window-biases", tmp_path / "theirs")
    copy_folder(source, tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    assert_identical(tensors_of(source), tensors_of(tmp_path / "again"))
    first, second = (config_from_hf(read_config_json(tmp_path / f)) for f in ("ours", "again"))
    assert first == second


def test_sharded_folders_are_read_and_written(tmp_path):
    source = save("llama", tmp_path / "theirs", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    config = config_from_hf(read_config_json(source))
    pieces = dict(read_pieces(source, config))
    whole = export_folder(tmp_path / "whole", config, pieces, texts=folder_texts(config))
    parts = export_folder(tmp_path / "p", config, pieces, texts=folder_texts(config), max_shard_bytes=60_000)
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert_identical(tensors_of(source), tensors_of(whole))
    assert_identical(tensors_of(source), tensors_of(parts))
    _, report = transformers.AutoModelForCausalLM.from_pretrained(parts, output_loading_info=True)
    assert not report["missing_keys"]


def test_dtype_is_cast_on_export(tmp_path):
    source = save("gpt2", tmp_path / "theirs")
    assert main(["export", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    expected = {k: v.bfloat16() for k, v in tensors_of(source).items()}
    assert_identical(tensors_of(tmp_path / "out"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_files_without_the_base_prefix_and_with_constants_are_read(tmp_path):
    """The published GPT-2 files: no `transformer.` prefix, and the causal masks stored as tensors."""
    source = save("gpt2", tmp_path / "theirs")
    tensors = {k.removeprefix("transformer."): v for k, v in tensors_of(source).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    save_file(tensors, bare / "model.safetensors")
    left, right = (model_pieces(load_folder(f)) for f in (source, bare))
    assert_identical(left, right)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, bare / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        load_folder(bare)


@pytest.fixture
def folder(tmp_path):
    return save("llama", tmp_path / "theirs")


def rewrite(folder, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_refused(folder):
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"1 tensors are missing: model\.norm\.weight"):
        load_folder(folder)


def test_an_unexpected_tensor_is_refused(folder):
    rewrite(folder, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"1 tensors have no place in a llama model.*layers\.3\.mlp\.up_proj"):
        load_folder(folder)


def test_a_wrong_shape_is_refused(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(UserError, match=r"norm\.weight has shape \[47\], but config\.json says \[48\]"):
        load_folder(folder)


def test_quantised_weights_are_refused(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is torch\.int8; only unquantised"):
        load_folder(folder)


def test_a_torn_file_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read as safetensors"):
        load_folder(folder)


def test_an_index_naming_a_missing_file_is_refused(tmp_path):
    folder = save("llama", tmp_path / "theirs", max_shard_size="60KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(StorageError, match=r"model-00002-of-.*cannot be read"):
        load_folder(folder)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json has no weight_map of tensor to file"):
        load_folder(folder)


def test_pieces_that_do_not_fit_the_model_are_refused(folder):
    model = load_folder(folder)
    pieces = model_pieces(model)
    norm = pieces.pop("final_norm.weight")
    with pytest.raises(UserError, match=r"nothing was given for final_norm\.weight"):
        load_pieces(model, pieces.items())
    with pytest.raises(UserError, match=r"last_norm\.weight has no place in the model"):
        load_pieces(model, [("last_norm.weight", norm)])


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*pytorch_model\.bin is a pickle"):
        load_folder(folder)


def test_a_missing_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist: a Hugging Face folder needs it"):
        load_folder(folder)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        load_folder(folder)


def test_an_occupied_place_is_refused_and_left_alone(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    assert main(["export", str(folder), str(tmp_path / "full")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]


def test_a_place_below_a_file_is_an_input_output_error(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", str(folder), str(tmp_path / "file" / "out")]) == 74
    assert capsys.readouterr().err.startswith("megalite: error: ")


def test_a_full_disk_is_an_input_output_error_and_leaves_nothing(folder, tmp_path):
    """A limit on the file size stands for the full disk: the write fails in the middle of a file."""
    code = (
        "import resource, sys\n"
        "from megalite.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "export", str(folder), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith("megalite: error: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"theirs"}


def test_weights_are_as_readable_as_the_configuration(folder, tmp_path):
    out = copy_folder(folder, tmp_path / "out")
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1


def test_nothing_is_left_when_a_tensor_is_bad(folder, tmp_path):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(UserError):
        copy_folder(folder, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"theirs"}


def test_find_folder_accepts_runs_checkpoints_and_folders(tmp_path):
    source = save("llama", tmp_path / "theirs")
    run = tmp_path / "run"
    for step in (5, 100):
        shutil.copytree(source, run / "checkpoints" / f"step_{step:08d}" / "weights")
    newest = run / "checkpoints" / "step_00000100"
    shutil.copytree(source, run / "checkpoints" / ".writing_step_00000200" / "weights")
    assert find_folder(run) == find_folder(newest) == find_folder(newest / "weights") == newest / "weights"
    assert find_folder(source) == source
    with pytest.raises(UserError, match=r"nowhere does not exist: give a run, a checkpoint"):
        find_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no run, checkpoint or Hugging Face folder"):
        find_folder(tmp_path)
