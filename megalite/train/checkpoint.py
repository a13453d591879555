"""Checkpoints that are the model, not the layout.

::

    step_00000500/
      checkpoint.json            what is here: steps, config, environment, every tensor's parts
      weights/                   a Hugging Face folder: config.json, tokenizer, *.safetensors (fp32 masters)
      optimizer/exp_avg.safetensors, exp_avg_sq.safetensors      moments under the weights' names and layout
      trainer.safetensors        the guard's history and the optimizer's counter

Every tensor is listed with its global shape and the parts it was written in: file, offset in the global
tensor, shape and fingerprint of the live values. Today each part is a whole projection; a sharded layout
writes more parts of the same tensors. Writing goes to a temporary folder, is forced to disk, read back
against the fingerprints, and only then renamed, so a folder without a leading dot is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.errors import StorageError, UserError
from megalite.models.families import HfTensor
from megalite.parallel.data import FlatBuffers
from megalite.parallel.state import Kind
from megalite.train.fingerprint import fingerprint
from megalite.train.runlog import write_atomically

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
KIND_FILES: dict[Kind, str] = {
    "master": "weights/model",
    "exp_avg": "optimizer/exp_avg",
    "exp_avg_sq": "optimizer/exp_avg_sq",
}
MAX_FILE_BYTES = 4 << 30
TRAINER_FILE = "trainer.safetensors"


@dataclass(slots=True)
class Snapshot:
    """A frozen copy of everything one checkpoint holds, on the host."""

    step: int
    files: dict[str, dict[str, Tensor]]
    """Tensors by file (relative path) and name."""
    manifest: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)
    """Small files beside the tensors: config.json, tokenizer files."""


def take_snapshot(
    buffers: FlatBuffers,
    hf_tensors: list[HfTensor],
    trainer_state: dict[str, Tensor],
    *,
    step: int,
    metadata: dict[str, Any],
    texts: dict[str, str],
) -> Snapshot:
    """Copy the live state to the host, in the files' layout, with fingerprints of the live tensors.

    Args:
        buffers: masters and moments.
        hf_tensors: the family's map from pieces to files' tensors.
        trainer_state: small tensors of the trainer.
        step: completed optimizer steps.
        metadata: what else the manifest records (config, environment, data fingerprint).
        texts: contents of the small files, by relative path.
    """
    files: dict[str, dict[str, Tensor]] = {
        TRAINER_FILE: {k: v.detach().cpu().clone() for k, v in trainer_state.items()}
    }
    tensors: dict[str, dict[str, Any]] = {kind: {} for kind in KIND_FILES}
    for kind, stem in KIND_FILES.items():
        live = {piece.name: view for piece, view in buffers.piece_tensors(kind)}
        for names, file in _files_of(hf_tensors, stem):
            files[file] = {}
            for tensor in names:
                files[file][tensor.name], parts = _assemble(tensor, live, file)
                tensors[kind][tensor.name] = {"shape": list(tensor.shape), "dtype": "float32", "parts": parts}
    trainer = {name: fingerprint(value) for name, value in trainer_state.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        **metadata,
        "tensors": tensors,
        "trainer": trainer,
    }
    weight_files = [file for file in files if file.startswith("weights/")]
    if len(weight_files) > 1:
        texts = texts | {"weights/model.safetensors.index.json": _hf_index(files, weight_files)}
    return Snapshot(step=step, files=files, manifest=manifest, texts=texts)


def _files_of(hf_tensors: list[HfTensor], stem: str) -> Iterator[tuple[list[HfTensor], str]]:
    """Divide the tensors into files of at most MAX_FILE_BYTES, named the way transformers expects."""
    groups: list[list[HfTensor]] = [[]]
    size = 0
    for tensor in hf_tensors:
        numbytes = 4 * torch.Size(tensor.shape).numel()
        if groups[-1] and size + numbytes > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += numbytes
    if len(groups) == 1:
        yield groups[0], f"{stem}.safetensors"
        return
    for i, group in enumerate(groups, 1):
        yield group, f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"


def _assemble(tensor: HfTensor, live: dict[str, Tensor], file: str) -> tuple[Tensor, list[dict[str, Any]]]:
    """One file tensor from the pieces it is made of, and the description of its parts."""
    whole = torch.empty(tensor.shape, dtype=torch.float32)
    parts = []
    for part in tensor.parts:
        view = live[part.piece].t() if part.transpose else live[part.piece]
        whole[part.index].copy_(view)
        parts.append(
            {
                "file": file,
                "offset": list(part.offset),
                "shape": list(part.shape),
                "fingerprint": fingerprint(view),
            }
        )
    return whole, parts


def _part_view(whole: Tensor, offset: Iterable[int], shape: Iterable[int]) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def _hf_index(files: dict[str, dict[str, Tensor]], weight_files: list[str]) -> str:
    weight_map = {name: Path(file).name for file in weight_files for name in files[file]}
    total = sum(t.numel() * 4 for file in weight_files for t in files[file].values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def write_snapshot(snapshot: Snapshot, root: Path) -> Path:
    """Write a snapshot as ``root/step_XXXXXXXX``, all or nothing.

    Raises:
        OSError: the disk is full or the place cannot be written; what was there before is untouched.
        StorageError: a file read back does not hold the live tensors' values.
    """
    final = root / f"step_{snapshot.step:08d}"
    temporary = root / f".writing_{final.name}"
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_files(snapshot, temporary)
        verify_folder(temporary, snapshot.manifest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # saved before the run was resumed from an earlier step
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync_folder(root)
    return final


def _write_files(snapshot: Snapshot, folder: Path) -> None:
    for file, tensors in snapshot.files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the operating system's error in text
            raise OSError(f"{path}: {error}") from error
        path.chmod(0o644)  # safetensors leaves the file readable by its owner alone
        _fsync(path)
    for file, text in snapshot.texts.items():
        write_atomically(folder / file, text)
    write_atomically(folder / MANIFEST, json.dumps(snapshot.manifest, indent=1) + "\n")
    for parent in (folder / "weights", folder / "optimizer", folder):
        _fsync_folder(parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_fsync_folder = _fsync


def verify_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every tensor in the files with the fingerprint of the live tensor it was made from.

    Raises:
        StorageError: a file or tensor is missing, unreadable or differs; the message names it.
    """
    for kind, name, part, value in _stored_parts(folder, manifest):
        if fingerprint(value) != part["fingerprint"]:
            raise StorageError(
                f"{folder / part['file']}: tensor {name} ({kind}) does not hold the values that were saved; "
                f"remove {folder} to go back to an earlier checkpoint"
            )


def _stored_parts(
    folder: Path, manifest: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any], Tensor]]:
    """Yield (kind, tensor name, part, stored values) of every part that the manifest lists."""
    by_file: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for kind, tensors in manifest["tensors"].items():
        for name, entry in tensors.items():
            for part in entry["parts"]:
                by_file.setdefault(part["file"], []).append((kind, name, part))
    for file, parts in by_file.items():
        with _open(folder / file) as stored:
            present, listed = set(stored.keys()), {name for _, name, _ in parts}
            if present != listed:
                odd = sorted(present ^ listed)
                raise StorageError(f"{folder / file}: tensors {odd} are missing or not in {MANIFEST}")
            cached: tuple[str, Tensor | None] = ("", None)
            for kind, name, part in parts:
                if cached[0] != name:
                    cached = (name, stored.get_tensor(name))
                assert cached[1] is not None
                yield kind, name, part, _part_view(cached[1], part["offset"], part["shape"])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read as safetensors ({error})") from error


def complete_checkpoints(root: Path) -> list[Path]:
    """All complete checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step_*") if (path / MANIFEST).exists())


def latest_checkpoint(root: Path, *, before_step: int | None = None) -> Path | None:
    """The complete checkpoint with the highest step, or with the highest that lies before 1-based `before_step`."""
    found = complete_checkpoints(root)
    if before_step is not None:
        found = [path for path in found if int(path.name.removeprefix("step_")) < before_step]
    return found[-1] if found else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        UserError: there is none, or it is of a later format.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is not a checkpoint: {error}") from error
    except json.JSONDecodeError as error:
        raise StorageError(f"{path}: not valid JSON ({error})") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise UserError(f"{path}: format_version={version}, this megalite reads {FORMAT_VERSION}")
    return manifest


def load_state(
    folder: Path, manifest: dict[str, Any], buffers: FlatBuffers, hf_tensors: list[HfTensor]
) -> dict[str, Tensor]:
    """Fill masters, moments and weights from a checkpoint; returns the trainer's tensors.

    Every piece must be filled exactly once and every stored tensor used.

    Raises:
        UserError: the stored model is not this model.
        StorageError: stored values differ from their fingerprints.
    """
    pieces = {(t.name, tuple(p.offset)): p for t in hf_tensors for p in t.parts}
    live: dict[str, dict[str, Tensor]] = {
        kind: {piece.name: view for piece, view in buffers.piece_tensors(kind)} for kind in KIND_FILES
    }
    missing = {(kind, part.piece) for kind in KIND_FILES for part in pieces.values()}
    buffers.zero_state()  # what no piece covers (padding) must not keep what the memory held before
    for kind, name, stored, value in _stored_parts(folder, manifest):
        part = pieces.get((name, tuple(stored["offset"])))
        if part is None or tuple(part.shape) != tuple(stored["shape"]):
            raise UserError(f"{folder}: tensor {name} of shape {stored['shape']} has no place in this model")
        if fingerprint(value) != stored["fingerprint"]:
            raise StorageError(
                f"{folder / stored['file']}: tensor {name} ({kind}) is damaged; "
                f"remove {folder} to go back to an earlier checkpoint"
            )
        live[kind][part.piece].copy_(value.t() if part.transpose else value)
        missing.discard((kind, part.piece))
    if missing:
        raise UserError(f"{folder}: nothing stored for {sorted(missing)[:4]} of this model")
    buffers.copy_master_to_weights()
    return _load_trainer_state(folder, manifest)


def _load_trainer_state(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    with _open(folder / TRAINER_FILE) as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    for name, expected in manifest["trainer"].items():
        if name not in state or fingerprint(state[name]) != expected:
            raise StorageError(f"{folder / TRAINER_FILE}: {name} is missing or damaged")
    return state


def keep_last(root: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints (0 keeps all), and what an earlier crash left half-written."""
    for leftover in root.glob(".removing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not count:
        return
    for old in complete_checkpoints(root)[:-count]:
        doomed = old.with_name(
            f".removing_{old.name}"
        )  # renamed first: a half-removed one must not look whole
        old.rename(doomed)
        shutil.rmtree(doomed)
