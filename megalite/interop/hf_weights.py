"""The tensors of a Hugging Face folder: safetensors, in one file or in several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import StorageError, UserError
from megalite.models.families import HfTensor, base_prefix, hf_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
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
            opened = {path: _open(path)}
        value = _get(opened[path], names[tensor.name], path)
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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the tensors as one safetensors file, or as several with an index where they are larger."""
    shards: list[list[HfTensor]] = [[]]
    used = total = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor.shape) * (dtype or piece(tensor.parts[0].piece).dtype).itemsize
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += num_bytes
        total += num_bytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        values = {t.name: t.assemble(piece) for t in shard}
        values = {name: value.to("cpu", dtype or value.dtype) for name, value in values.items()}
        try:
            save_file(values, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the operating system's error in text
            raise OSError(f"{folder / name}: {error}") from error
        weight_map |= dict.fromkeys(values, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


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
        with _open(path) as stored:
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
    first, second = (_get(_open(files[name]), name, files[name]) for name in names)
    if not torch.equal(first, second):
        raise UserError(
            f"{files['lm_head.weight']}: lm_head.weight differs from the embedding, but config.json says "
            "tie_word_embeddings=True: set it to false"
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read as safetensors: {error}") from error


def _get(stored: Any, name: str, path: Path) -> Tensor:
    try:
        value: Tensor = stored.get_tensor(name)
    except SafetensorError as error:
        raise StorageError(f"{path}: {name} cannot be read: {error}") from error
    return value


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
