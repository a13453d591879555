from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.config import ModelConfig
from megalite.errors import StorageError, UserError
from megalite.models.families import hf_tensors
from megalite.train import checkpoint as ckpt
from megalite.train import checkpoint_save
from megalite.train.checkpoint_blocks import KIND_FILES
from megalite.train.checkpoint_load import load_state
from megalite.train.checkpoint_save import write_snapshot
from megalite.train.checkpoint_snapshot import Snapshot, take_snapshot
from megalite.train.fingerprint import fingerprint
from megalite.train.saver import Saver
from tests.train.boxed_state import BoxedState, Layout

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {
    "family": "gpt2",
    "norm": "layer",
    "position": "learned",
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "gpt2": ModelConfig(vocab_size=301, **SMALL, **GPT2),
    "llama": ModelConfig(vocab_size=301, num_key_value_heads=2, **SMALL),
    "qwen3": ModelConfig(
        vocab_size=301, num_key_value_heads=2, family="qwen3", qk_norm=True, head_dim=16, **SMALL
    ),
}


def state_of(config: ModelConfig, fill: float | None = None) -> BoxedState:
    return BoxedState(config, Layout(), 0, fill=fill)


def snapshot_of(config: ModelConfig, step: int = 3) -> Snapshot:
    state = {"step_count": torch.tensor(3.0), "history": torch.arange(4.0)}
    texts = {"weights/config.json": "{}"}
    return take_snapshot(
        state_of(config), hf_tensors(config), state, step=step, metadata={"tokens": 7}, texts=texts
    )


def save(config: ModelConfig, root: Path, step: int = 3) -> Path:
    return write_snapshot(snapshot_of(config, step), root)[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_everything_comes_back_bit_for_bit(family, tmp_path):
    config = CONFIGS[family]
    folder = save(config, tmp_path)
    other = state_of(config, fill=torch.nan)
    trainer = load_state(folder, ckpt.read_manifest(folder), other, hf_tensors(config))
    assert other.wrong() == []
    assert other.updated, "the model's weights have to be set from the masters"
    assert torch.equal(trainer["history"], torch.arange(4.0))


@pytest.mark.parametrize("family", CONFIGS)
def test_files_hold_the_true_vocabulary_in_hugging_face_layout(family, tmp_path):
    config = CONFIGS[family]
    folder = save(config, tmp_path)
    for file in ("weights/model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        stored = load_file(folder / f"{file}.safetensors")
        assert {name: tuple(t.shape) for name, t in stored.items()} == {
            t.name: t.shape for t in hf_tensors(config)
        }
        embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
        assert stored[embedding].shape[0] == 301


def test_large_models_are_split_into_files_with_an_index(tmp_path, monkeypatch):
    config = CONFIGS["llama"]
    monkeypatch.setattr(
        checkpoint_save, "files_of", functools.partial(checkpoint_save.files_of, max_bytes=40_000)
    )
    folder = save(config, tmp_path)
    index = json.loads((folder / "weights/model.safetensors.index.json").read_text())
    files = {path.name for path in (folder / "weights").glob("*.safetensors")}
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files
    other = state_of(config, fill=torch.nan)
    load_state(folder, ckpt.read_manifest(folder), other, hf_tensors(config))
    assert other.wrong() == []


def test_a_stale_copy_is_noticed_before_the_checkpoint_appears(tmp_path):
    """What an asynchronous save gets wrong first: the weights move on, the written copy does not."""
    config = CONFIGS["llama"]
    snapshot = snapshot_of(config)
    index, block = next(iter(snapshot.blocks.items()))
    block.values.add_(1e-3)
    with pytest.raises(StorageError, match=index.fqn.removeprefix("master/")):
        write_snapshot(snapshot, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["weights/model.safetensors", "optimizer/exp_avg_sq.safetensors"])
def test_a_flipped_bit_is_an_error_that_names_the_tensor(file, tmp_path):
    config = CONFIGS["llama"]
    folder = save(config, tmp_path)
    raw = bytearray((folder / file).read_bytes())
    raw[-5] ^= 1
    (folder / file).write_bytes(raw)
    with pytest.raises(StorageError, match=r"is damaged; remove .* to go back to an earlier checkpoint"):
        load_state(folder, ckpt.read_manifest(folder), state_of(config), hf_tensors(config))


def test_a_short_file_is_an_error(tmp_path):
    config = CONFIGS["llama"]
    folder = save(config, tmp_path)
    path = folder / "optimizer/exp_avg.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"exp_avg\.safetensors cannot be read as safetensors"):
        load_state(folder, ckpt.read_manifest(folder), state_of(config), hf_tensors(config))


def test_a_dropped_tensor_is_an_error(tmp_path):
    config = CONFIGS["llama"]
    folder = save(config, tmp_path)
    path = folder / "weights/model.safetensors"
    stored = load_file(path)
    stored.pop("model.norm.weight")
    save_file(stored, path)
    with pytest.raises(StorageError, match=r"model\.norm\.weight"):
        load_state(folder, ckpt.read_manifest(folder), state_of(config), hf_tensors(config))


def test_a_tensor_missing_from_manifest_and_file_is_an_error(tmp_path):
    config = CONFIGS["llama"]
    folder = save(config, tmp_path)
    manifest = ckpt.read_manifest(folder)
    for kind, stem in KIND_FILES.items():
        manifest["tensors"][kind].pop("model.norm.weight")
        stored = load_file(folder / f"{stem}.safetensors")
        stored.pop("model.norm.weight")
        save_file(stored, folder / f"{stem}.safetensors")
    with pytest.raises(UserError, match=r"nothing stored for .*final_norm\.weight"):
        load_state(folder, manifest, state_of(config), hf_tensors(config))


def test_another_model_is_refused(tmp_path):
    folder = save(CONFIGS["llama"], tmp_path)
    other = ModelConfig(vocab_size=301, **{**SMALL, "num_layers": 3})
    with pytest.raises(UserError, match="has no place in this model"):
        load_state(folder, ckpt.read_manifest(folder), state_of(other), hf_tensors(other))


def test_a_later_format_is_refused(tmp_path):
    folder = save(CONFIGS["llama"], tmp_path)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format_version=99"):
        ckpt.read_manifest(folder)


def test_only_complete_checkpoints_are_found_and_the_newest_are_kept(tmp_path):
    config = CONFIGS["llama"]
    for step in (1, 2, 3, 12):
        save(config, tmp_path, step)
    shutil.copytree(tmp_path / "step_00000012", tmp_path / ".writing_step_00000013")
    (tmp_path / "step_00000099").mkdir()
    assert ckpt.latest_checkpoint(tmp_path) == tmp_path / "step_00000012"
    assert ckpt.latest_checkpoint(tmp_path, before_step=3) == tmp_path / "step_00000002"
    ckpt.keep_last(tmp_path, 2)
    assert [p.name for p in ckpt.complete_checkpoints(tmp_path)] == ["step_00000003", "step_00000012"]
    assert not list(tmp_path.glob(".*")), "what a crash left half-written goes too"


def test_a_checkpoint_saved_again_takes_the_place_of_the_old_one(tmp_path):
    config = CONFIGS["llama"]
    folder = save(config, tmp_path)
    (folder / "old").touch()
    assert save(config, tmp_path) == folder
    assert not (folder / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_no_pickle_is_written(tmp_path):
    folder = save(CONFIGS["llama"], tmp_path)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_raised_and_leaves_the_old_checkpoint(asynchronous, tmp_path, monkeypatch):
    config = CONFIGS["llama"]
    save(config, tmp_path, step=1)
    saver = Saver(tmp_path, keep=1, asynchronous=asynchronous)
    snapshot = snapshot_of(config, step=2)

    def no_space(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)

    def attempt() -> None:
        saver.save(snapshot)
        saver.wait()

    with pytest.raises(OSError, match="No space left"):
        attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_fingerprints_see_values_order_and_zeros():
    base = torch.arange(100_000, dtype=torch.float32)
    swapped = base.clone()
    swapped[[3, 70_000]] = swapped[[70_000, 3]]
    longer = torch.cat([torch.zeros(1), base])
    negative_zero = base.clone()
    negative_zero[0] = -0.0
    prints = {fingerprint(t) for t in (base, swapped, longer, base.bfloat16(), base.double(), negative_zero)}
    assert len(prints) == 6
    matrix = torch.randn(300, 500)
    assert fingerprint(matrix.t()) == fingerprint(matrix.t().contiguous())
    assert fingerprint(matrix) == fingerprint(matrix.clone())
    assert len(fingerprint(torch.tensor(1.0))) == 16
    assert fingerprint(torch.empty(0)) == "0" * 16
