"""Checkpoints that are the model, not the layout.

::

    step_00000500/
      checkpoint.json            what is here: steps, config, environment, every tensor's parts
      weights/                   a Hugging Face folder: config.json, tokenizer, *.safetensors (fp32 masters)
      optimizer/exp_avg.safetensors, exp_avg_sq.safetensors      moments under the weights' names and layout
      trainer.safetensors        the guard's history and the optimizer's counter

The tensor files are the same to the last byte whatever layout wrote them. The manifest lists every tensor with
its global shape and the parts it was written in: file, offset in the tensor, shape and fingerprint of the live
values. A part is what one process held (a whole projection where there is one process). Writing goes to a
temporary folder, is forced to disk, read back against the fingerprints, and only then renamed, so a folder
without a leading dot is complete.

Here: the folder, its manifest, and finding and removing checkpoints. `checkpoint_save` writes, `checkpoint_load`
reads them into a live model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megalite.errors import StorageError, UserError
from megalite.interop.tensor_file import get_tensor, open_tensors
from megalite.train.fingerprint import fingerprint

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
TRAINER_FILE = "trainer.safetensors"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One part of a stored tensor, as the manifest describes it."""

    kind: str
    name: str
    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    fingerprint: str

    @property
    def key(self) -> str:
        """Kind and name."""
        return f"{self.kind}/{self.name}"

    def check(self, value: Tensor, folder: Path) -> None:
        """Compare stored values with the fingerprint of the live ones.

        Raises:
            StorageError: they differ.
        """
        if fingerprint(value) != self.fingerprint:
            raise StorageError(
                f"{folder / self.file}: tensor {self.name} ({self.kind}) is damaged; "
                f"remove {folder} to go back to an earlier checkpoint"
            )


def stored_parts(manifest: dict[str, Any]) -> Iterator[StoredPart]:
    """Every part that a manifest lists."""
    for kind, tensors in manifest["tensors"].items():
        for name, entry in tensors.items():
            for p in entry["parts"]:
                offset, shape = tuple(p["offset"]), tuple(p["shape"])
                yield StoredPart(kind, name, p["file"], offset, shape, p["fingerprint"])


def read_parts(
    folder: Path, manifest: dict[str, Any], wanted: Iterable[StoredPart]
) -> Iterator[tuple[StoredPart, Tensor]]:
    """Yield parts with their stored values (maps of the file), one file after the other.

    Raises:
        StorageError: a file is missing, unreadable, or holds other tensors than the manifest lists.
    """
    listed: dict[str, set[str]] = {}
    for part in stored_parts(manifest):
        listed.setdefault(part.file, set()).add(part.name)
    by_file: dict[str, dict[str, list[StoredPart]]] = {}
    for part in wanted:
        by_file.setdefault(part.file, {}).setdefault(part.name, []).append(part)
    for file, by_name in by_file.items():
        path = folder / file
        with open_tensors(path) as stored:
            if odd := sorted(set(stored.keys()) ^ listed[file]):
                raise StorageError(f"{path}: tensors {odd} are missing or not in {MANIFEST}")
            for name, parts in by_name.items():
                tensor = get_tensor(stored, name, path)
                for part in parts:
                    yield part, part_view(tensor, part.offset, part.shape)


def part_view(tensor: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """A block of a tensor; shares its memory."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def verify_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every tensor in the files with the fingerprint of the live tensor it was made from.

    Raises:
        StorageError: a file or tensor is missing, unreadable or differs; the message names it.
    """
    for part, value in read_parts(folder, manifest, stored_parts(manifest)):
        part.check(value, folder)


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


def keep_last(root: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints (0 keeps all), and what an earlier crash left half-written.

    Nothing may be being written under `root` meanwhile.
    """
    for pattern in (".removing_*", ".writing_*"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    if not count:
        return
    for old in complete_checkpoints(root)[:-count]:
        doomed = removed_name(old)  # renamed first: a half-removed one must not look whole
        old.rename(doomed)
        shutil.rmtree(doomed)


def removed_name(folder: Path) -> Path:
    """What a checkpoint is called while it is removed."""
    return folder.with_name(f".removing_{folder.name}")
