"""The tensors of a Hugging Face folder: safetensors, in one file or in several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.interop.tensor_file import (
    INDEX_SUFFIX,
    MAX_FILE_BYTES,
    Entry,
    get_tensor,
    index_text,
    open_tensors,
    plan_files,
)
from megalite.models.families import HfTensor, base_prefix, hf_tensors

WEIGHTS_STEM = "model"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
INDEX_FILE = WEIGHTS_STEM + INDEX_SUFFIX
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Constants that older versions of transformers stored beside the weights.
_STORED_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_pieces(folder: str | Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, whole piece) of every piece of the model, one file tensor in memory at a time.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape or type than `config` says.
        StorageError: a file cannot be read.
    """
    files = _tensor_files(Path(folder))
    expected = hf_tensors(config)
    names = _match_names(expected, files, config, Path(folder))
    opened: dict[Path, Any] = {}
    for tensor in expected:
        path = files[names[tensor.name]]
        if path not in opened:
            opened = {path: open_tensors(path)}
        value = get_tensor(opened[path], names[tensor.name], path)
        if tuple(value.shape) != tensor.shape:
            raise UserError(
                f"{path}: {tensor.name} has shape {list(value.shape)}, but config.json says "
                f"{list(tensor.shape)}"
            )
        if value.dtype not in (*DTYPES.values(), torch.float64):
            raise UserError(f"{path}: {tensor.name} is {value.dtype}; only unquantised weights can be read")
        yield from tensor.take_apart(value)
    _check_tied_head(files, config)


def write_weights(
    folder: Path,
    tensors: list[HfTensor],
    piece: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the tensors as one safetensors file, or as several with an index where they are larger.

    Args:
        folder: where.
        tensors: what the files hold.
        piece: the whole piece of a canonical name.
        dtype: what values are cast to; None keeps each tensor's.
        max_shard_bytes: largest file.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    entries = [Entry(t.name, t.shape, dtype or piece(t.parts[0].piece).dtype) for t in tensors]
    files = plan_files(entries, WEIGHTS_STEM, max_bytes=max_shard_bytes)
    by_name = {t.name: t for t in tensors}
    for file in files:
        file.create(folder)
        with file.writer(folder) as out:
            for name, entry in file.entries.items():
                out.write(name, (0,) * len(entry.shape), by_name[name].assemble(piece).to("cpu", entry.dtype))
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(index_text(files), encoding="utf-8")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it, from one file or from an index of several."""
    if (folder / WEIGHTS_FILE).is_file():
        paths = [folder / WEIGHTS_FILE]
    elif (folder / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX_FILE} has no weight_map of tensor to file: {error}") from None
    else:
        pickled = sorted(folder.glob("*.bin"))
        hint = f"; {pickled[0].name} is a pickle, which is never read" if pickled else ""
        raise UserError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    files: dict[str, Path] = {}
    for path in paths:
        with open_tensors(path) as stored:
            files |= dict.fromkeys(stored.keys(), path)
    return files


def _match_names(
    expected: list[HfTensor], files: Mapping[str, Path], config: ModelConfig, folder: Path
) -> dict[str, str]:
    """Expected name → name in the files, which may leave out the base model's prefix."""
    prefix = base_prefix(config)
    bare = not any(name.startswith(prefix) for name in files)
    names = {t.name: t.name.removeprefix(prefix) if bare else t.name for t in expected}
    missing = sorted(set(names.values()) - files.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing: {_some(missing)}")
    allowed = {"lm_head.weight"} if config.tie_word_embeddings else set()
    left = files.keys() - set(names.values()) - allowed
    unexpected = sorted(name for name in left if not name.endswith(_STORED_CONSTANTS))
    if unexpected:
        raise UserError(
            f"{folder}: {len(unexpected)} tensors have no place in a {config.family} model as config.json "
            f"describes it: {_some(unexpected)}"
        )
    return names


def _check_tied_head(files: Mapping[str, Path], config: ModelConfig) -> None:
    """A head stored though tied must be the embedding, or loading would drop it."""
    if not config.tie_word_embeddings or "lm_head.weight" not in files:
        return
    embedding = next(t.name for t in hf_tensors(config) if t.parts[0].piece == "embedding.weight")
    names = (
        embedding if embedding in files else embedding.removeprefix(base_prefix(config)),
        "lm_head.weight",
    )
    first, second = (get_tensor(open_tensors(files[name]), name, files[name]) for name in names)
    if not torch.equal(first, second):
        raise UserError(
            f"{files['lm_head.weight']}: lm_head.weight differs from the embedding, but config.json says "
            "tie_word_embeddings=True: set it to false"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
