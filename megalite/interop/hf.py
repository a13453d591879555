"""Hugging Face folders: ``config.json``, ``*.safetensors`` and the tokenizer, read and written.

A checkpoint's ``weights/`` is such a folder already, so exporting only casts, consolidates and checks, and
any folder of a known family can be trained further or sampled from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.interop.hf_config import config_from_hf, config_to_hf
from megalite.interop.hf_weights import DTYPES, read_pieces, write_weights
from megalite.interop.tensor_file import MAX_FILE_BYTES
from megalite.models.families import hf_tensors, piece_shapes
from megalite.models.transformer import Transformer
from megalite.parallel.pieces import Box, iter_pieces, piece_view

__all__ = [
    "DTYPES",
    "config_from_hf",
    "config_to_hf",
    "copy_folder",
    "export_folder",
    "find_folder",
    "folder_texts",
    "load_folder",
    "load_pieces",
    "model_pieces",
    "read_config_json",
    "read_pieces",
]

CONFIG_FILE = "config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_KEPT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
def load_pieces(model: Transformer, pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every whole piece into `model`, or the parts of them that it holds; vocabulary padding becomes zero.

    Raises:
        UserError: a piece is missing or has no place in the model.
    """
    own = (Box(piece, piece.offset, piece_view(p, piece)) for p, _, piece in iter_pieces(model))
    places = {box.piece.name: box for box in own}
    missing = set(piece_shapes(model.config))
    for parameter in model.parameters():
        parameter.zero_()
    for name, value in pieces:
        if name not in missing:
            raise UserError(f"{name} has no place in the model")
        missing.discard(name)
        if name in places:
            places[name].tensor.copy_(value[places[name].index])
    if missing:
        raise UserError(f"nothing was given for {', '.join(sorted(missing))}")


def model_pieces(model: Transformer) -> dict[str, Tensor]:
    """Canonical name → whole piece of a model's weights, sharing their memory."""
    return {p.name: piece_view(parameter, p).detach() for parameter, _, p in iter_pieces(model)}


def export_folder(
    folder: str | Path,
    config: ModelConfig,
    pieces: Mapping[str, Tensor],
    *,
    texts: Mapping[str, str],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads. All or nothing.

    Args:
        folder: where; must not exist, or be empty.
        config: the model.
        pieces: whole pieces by canonical name.
        texts: the small files by name, config.json among them, from `folder_texts`.
        dtype: what the weights are cast to; None keeps theirs.
        max_shard_bytes: largest weight file; more go into several, with an index.

    Raises:
        UserError: the folder holds something, or the family cannot express the model.
        OSError: the disk is full, or the place cannot be written.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder: choose another place, or remove it")
    tensors = hf_tensors(config)
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_weights(temporary, tensors, pieces.__getitem__, dtype=dtype, max_shard_bytes=max_shard_bytes)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def copy_folder(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the model in one Hugging Face folder to another: checked, consolidated and cast.

    Tokenizer files are copied as they are; ``config.json`` is written anew, so it says what was understood.

    Raises:
        UserError, StorageError, OSError: `read_pieces` and `export_folder` say when.
    """
    values = read_config_json(source)
    config = config_from_hf(values)
    # The tensors are maps of the file: a model larger than the memory passes through.
    pieces = dict(read_pieces(source, config))
    stored = dtype or pieces["embedding.weight"].dtype
    kept = {key: values[key] for key in _KEPT_IDS if key in values}
    texts = {CONFIG_FILE: _dump(config_to_hf(config, dtype=_name(stored)) | kept)}
    for name in _TOKENIZER_FILES:
        path = Path(source) / name
        if path.is_file():
            texts[name] = path.read_text(encoding="utf-8")
    return export_folder(target, config, pieces, texts=texts, dtype=dtype)


def folder_texts(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    eod_id: int | None = None,
) -> dict[str, str]:
    """Contents of a folder's small files by name: the configuration and, if given, the tokenizer.

    Args:
        config: the model.
        dtype: what the weights are stored in.
        tokenizer: contents of a ``tokenizer.json``.
        eod_id: its end-of-document token, which also starts a document.

    Raises:
        UserError: the family cannot express the model, or the tokenizer does not fit its vocabulary.
    """
    texts = {CONFIG_FILE: _dump(config_to_hf(config, dtype=_name(dtype), eos_token_id=eod_id))}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer
        texts["tokenizer_config.json"] = _dump(_tokenizer_config(tokenizer, config, eod_id))
    return texts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        # Without this, version 4 of transformers adds token types, which its own models then refuse.
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": eod,
        "eos_token": eod,
    }


def _dump(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
