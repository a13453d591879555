"""Hugging Face folders: ``config.json``, ``*.safetensors`` and the tokenizer, read and written.

A checkpoint's ``weights/`` is such a folder already, so exporting only casts, consolidates and checks, and
any folder of a known family can be trained further or sampled from.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import StorageError, UserError
from megalite.interop.hf_config import config_from_hf, config_to_hf
from megalite.models.families import HfTensor, base_prefix, hf_tensors
from megalite.models.transformer import Transformer
from megalite.parallel.pieces import iter_pieces, piece_view

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Constants that older versions of transformers stored beside the weights.
_STORED_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def find_folder(path: str | Path) -> Path:
    """The Hugging Face folder meant by `path`: itself, a checkpoint's weights, or a run's newest checkpoint.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        return folder
    if (folder / "weights" / CONFIG_FILE).is_file():
        return folder / "weights"
    checkpoints = sorted((folder / "checkpoints").glob("step_*/weights/" + CONFIG_FILE))
    if checkpoints:
        return checkpoints[-1].parent
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a run, a checkpoint or a Hugging Face folder")
    raise UserError(
        f"{folder} is no run, checkpoint or Hugging Face folder: it has no {CONFIG_FILE}, no weights/ and no "
        "complete checkpoints/step_*"
    )


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The folder's ``config.json`` as it is.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a Hugging Face folder needs it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


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
                f"{path}: {tensor.name} has shape {list(value.shape)}, but {CONFIG_FILE} says "
                f"{list(tensor.shape)}"
            )
        if value.dtype not in (*DTYPES.values(), torch.float64):
            raise UserError(f"{path}: {tensor.name} is {value.dtype}; only unquantised weights can be read")
        yield from tensor.take_apart(value)
    _check_tied_head(files, config)


def load_folder(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Transformer:
    """The model in a Hugging Face folder, its weights cast to `dtype`.

    Raises:
        UserError: `read_config_json`, `config_from_hf`, `read_pieces` say what.
    """
    config = config_from_hf(read_config_json(folder))
    model = Transformer(config, dtype=dtype, device=device)
    load_pieces(model, read_pieces(folder, config))
    return model


@torch.no_grad()
def load_pieces(model: Transformer, pieces: Iterator[tuple[str, Tensor]]) -> None:
    """Copy every piece into `model`; vocabulary padding rows become zero.

    Raises:
        UserError: a piece is missing or has no place in the model.
    """
    places = {piece.name: piece_view(parameter, piece) for parameter, _, piece in iter_pieces(model)}
    for parameter in model.parameters():
        parameter.zero_()
    for name, value in pieces:
        if name not in places:
            raise UserError(f"{name} has no place in the model")
        places.pop(name).copy_(value)
    if places:
        raise UserError(f"nothing was given for {', '.join(sorted(places))}")


def model_pieces(model: Transformer) -> dict[str, Tensor]:
    """Canonical name → whole piece of a model's weights, sharing their memory."""
    return {p.name: piece_view(parameter, p).detach() for parameter, _, p in iter_pieces(model)}


def export_folder(
    folder: str | Path,
    config: ModelConfig,
    pieces: Mapping[str, Tensor] | Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    eod_id: int | None = None,
) -> Path:
    """Write a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads. All or nothing.

    Args:
        folder: where; must not exist, or be empty.
        config: the model.
        pieces: whole pieces by canonical name.
        dtype: what the weights are cast to.
        tokenizer: contents of a ``tokenizer.json`` to put beside them.
        eod_id: its end-of-document token.

    Raises:
        UserError: the folder holds something, the family cannot express the model, or the tokenizer does
            not fit the vocabulary.
        OSError: the disk is full, or the place cannot be written.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder: choose another place, or remove it")
    texts = folder_texts(config, dtype=dtype, tokenizer=tokenizer, eod_id=eod_id)
    lookup = pieces if callable(pieces) else pieces.__getitem__
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_weights(temporary, hf_tensors(config), lookup, dtype=dtype)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def folder_texts(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    eod_id: int | None = None,
) -> dict[str, str]:
    """Contents of the folder's small files by name: the configuration and, if given, the tokenizer."""
    name = str(dtype).removeprefix("torch.")
    texts = {CONFIG_FILE: _dump(config_to_hf(config, dtype=name, eos_token_id=eod_id))}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer
        texts["tokenizer_config.json"] = _dump(_tokenizer_config(tokenizer, config, eod_id))
    return texts


def _tokenizer_config(tokenizer: str, config: ModelConfig, eod_id: int | None) -> dict[str, Any]:
    """What AutoTokenizer needs beside tokenizer.json: its class and the end-of-document token."""
    parsed = json.loads(tokenizer)
    ids = {entry["id"]: entry["content"] for entry in parsed.get("added_tokens", [])}
    vocabulary = parsed["model"].get("vocab", {})
    if isinstance(vocabulary, dict):
        ids |= {i: token for token, i in vocabulary.items() if i not in ids}
    largest = max(ids, default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer's largest token id {largest} does not fit model.vocab_size={config.vocab_size}"
        )
    if eod_id is not None and eod_id not in ids:
        raise UserError(f"the tokenizer has no token with the end-of-document id {eod_id}")
    eod = None if eod_id is None else ids[eod_id]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "bos_token": eod,
        "eos_token": eod,
    }


def write_weights(
    folder: Path,
    tensors: list[HfTensor],
    piece: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the tensors as one safetensors file, or as several with an index where they are larger."""
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[list[HfTensor]] = [[]]
    used = total = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor.shape) * size
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += num_bytes
        total += num_bytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        values = {t.name: t.assemble(piece).to("cpu", dtype).contiguous() for t in shard}
        try:
            save_file(values, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the operating system's error in text
            raise OSError(f"{folder / name}: {error}") from error
        weight_map |= dict.fromkeys(values, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(_dump(index), encoding="utf-8")


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
            f"{folder}: {len(unexpected)} tensors have no place in a {config.family} model as {CONFIG_FILE} "
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
            f"{files['lm_head.weight']}: lm_head.weight differs from the embedding, but {CONFIG_FILE} says "
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


def _dump(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
