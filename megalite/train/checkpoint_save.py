"""Saving: a snapshot on the training thread, then every process writes its own blocks into the same files.

The engine is ``torch.distributed.checkpoint``: it gathers the processes' plans, has the first one decide, and
brings any process's error to all of them. What is saved, and how files look, is said here: the planner knows
which blocks there are and who writes one that several hold; the writer puts them into safetensors files whose
headers are known beforehand, so that the files' bytes do not depend on the layout.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from megalite.errors import StorageError, UserError
from megalite.interop.tensor_file import (
    INDEX_SUFFIX,
    TensorFile,
    get_tensor,
    index_text,
    open_tensors,
    side_by_side,
)
from megalite.parallel.mesh import ALONE, Axis
from megalite.parallel.state import Kind
from megalite.train.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    TRAINER_FILE,
    keep_last,
    part_view,
    removed_name,
)
from megalite.train.checkpoint_blocks import KIND_FILES, Block, files_of, makes_up, split_key
from megalite.train.checkpoint_snapshot import Snapshot
from megalite.train.fingerprint import fingerprint
from megalite.train.runlog import write_atomically


class BlockSavePlanner(SavePlanner):
    """Says which blocks are written, and by whom: each by one process, spread evenly over those that hold it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.mine: frozenset[MetadataIndex] = frozenset(snapshot.blocks)
        """What this process writes, once that is decided."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing to do: the snapshot is known already."""

    def create_local_plan(self) -> SavePlan:
        """Every block of this process, and what it holds of the trainer's state."""
        items = [_write_item(index, block) for index, block in self.snapshot.blocks.items()]
        held = {name: fingerprint(value) for name, value in self.snapshot.trainer.items()}
        return SavePlan(items, planner_data=held)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Each block to one process. Every tensor must come out whole."""
        for rank, plan in enumerate(all_plans):
            if plan.planner_data != all_plans[0].planner_data:
                raise RuntimeError(
                    f"rank {rank} and rank 0 differ in the trainer's state {sorted(plan.planner_data)}"
                )
        chosen = _share_out(all_plans)
        stored: dict[str, Any] = {}
        for item in (item for plan in chosen for item in plan.items):
            data = _tensor_data(item)
            entry = TensorStorageMetadata(data.properties, data.size, [])
            stored.setdefault(item.index.fqn, entry).chunks.append(data.chunk)
        for kind in KIND_FILES:
            for tensor in self.snapshot.hf_tensors:
                found = stored.get(f"{kind}/{tensor.name}")
                extents = [(tuple(c.offsets), tuple(c.sizes)) for c in found.chunks] if found else []
                if not makes_up(tensor.shape, extents):
                    raise RuntimeError(
                        f"not every element of {tensor.name} ({kind}) would be saved exactly once"
                    )
        return chosen, Metadata(stored)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Remember what is this process's to write."""
        self.mine = frozenset(item.index for item in new_plan.items)
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The block's values, on the host."""
        return self.snapshot.blocks[write_item.index].values


def _write_item(index: MetadataIndex, block: Block) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.shape))
    properties = TensorProperties(dtype=block.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(block.whole))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _tensor_data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _place(item: WriteItem) -> tuple[int, ...]:
    return tuple(_tensor_data(item).chunk.offsets)


def _values(planner: SavePlanner, item: WriteItem) -> Tensor:
    values = planner.resolve_data(item)
    assert isinstance(values, Tensor)
    return values


def _share_out(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each block to the one of its holders that has the least to write so far.

    (torch's own function for this counts a block as its whole tensor.)
    """
    holders: dict[MetadataIndex, list[int]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(rank)
    sizes = {item.index: math.prod(_tensor_data(item).chunk.sizes) for plan in plans for item in plan.items}
    load = [0] * len(plans)
    writers: dict[MetadataIndex, int] = {}
    # Those without a choice first: they are what the others are balanced against.
    for index in sorted(
        holders, key=lambda index: (len(holders[index]), -sizes[index], index.fqn, index.offset)
    ):
        writers[index] = min(holders[index], key=lambda rank: load[rank])
        load[writers[index]] += sizes[index]
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if writers[item.index] == rank])
        for rank, plan in enumerate(plans)
    ]


class CheckpointWriter(StorageWriter):
    """Writes ``root/step_XXXXXXXX``, all or nothing, with every process writing its blocks into the same files.

    Args:
        snapshot: what this process holds.
        root: the run's ``checkpoints`` folder, on a file system that all processes share.
        keep: checkpoints kept after this one is complete; 0 keeps all.
    """

    def __init__(self, snapshot: Snapshot, root: Path, keep: int = 0) -> None:
        self.snapshot = snapshot
        self.root = root
        self.keep = keep
        self.final = root / f"step_{snapshot.step:08d}"
        self.temporary = root / f".writing_{self.final.name}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first process makes the files when it has everybody's plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first process: make all files at their full size, and tell the others their type."""
        types = {_tensor_data(item).properties.dtype for plan in plans for item in plan.items}
        assert len(types) == 1, f"state of several types: {types}"
        [dtype] = types
        shutil.rmtree(self.temporary, ignore_errors=True)
        for files in self._files(dtype).values():
            (self.temporary / files[0].name).parent.mkdir(parents=True, exist_ok=True)
            for file in files:
                file.create(self.temporary)
        return [dataclasses.replace(plan, storage_data=dtype) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's blocks, force them to disk, read them back; each with its entry of the manifest.

        Raises (from the future's maker):
            OSError: the disk is full or the place cannot be written.
            StorageError: a block read back does not hold the live tensor's values.
        """
        wanted: dict[str, list[WriteItem]] = {}
        for item in sorted(plan.items, key=_place):
            wanted.setdefault(item.index.fqn, []).append(item)
        results = []
        for kind, files in self._files(plan.storage_data).items() if plan.items else ():
            for file in files:
                here = {name: wanted[f"{kind}/{name}"] for name in file.entries if f"{kind}/{name}" in wanted}
                if not here:
                    continue
                with file.writer(self.temporary) as out:
                    for name, items in here.items():
                        blocks = ((_place(item), _values(planner, item)) for item in items)
                        for offset, block in side_by_side(blocks):
                            out.write(name, offset, block)
                results += self._read_back(file, [item for items in here.values() for item in items])
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _read_back(self, file: TensorFile, items: list[WriteItem]) -> list[WriteResult]:
        path = self.temporary / file.name
        results = []
        with open_tensors(path) as stored:
            for item in items:
                kind, name = split_key(item.index.fqn)
                chunk = _tensor_data(item).chunk
                value = part_view(get_tensor(stored, name, path), chunk.offsets, chunk.sizes)
                expected = self.snapshot.fingerprints[item.index]
                if fingerprint(value) != expected:
                    raise StorageError(
                        f"{path}: tensor {name} ({kind}) does not hold the values that were saved: the disk, or the "
                        "memory of this machine, lost some; earlier checkpoints are intact"
                    )
                part = {
                    "file": file.name,
                    "offset": list(chunk.offsets),
                    "shape": list(chunk.sizes),
                    "fingerprint": expected,
                }
                results.append(WriteResult(item.index, value.nbytes, part))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first process, when all have written: the small files and the manifest, then the final name."""
        dtypes = {kept.properties.dtype for kept in metadata.state_dict_metadata.values()}  # type: ignore[union-attr]
        [dtype] = dtypes
        parts: dict[str, list[dict[str, Any]]] = {}
        for result in (result for rank in results for result in rank):
            parts.setdefault(result.index.fqn, []).append(result.storage_data)
        for tensor_parts in parts.values():
            tensor_parts.sort(key=lambda part: tuple(part["offset"]))
        self._write_small_files(dtype)
        manifest = json.dumps(self._manifest(dtype, parts), indent=1) + "\n"
        write_atomically(self.temporary / MANIFEST, manifest)
        for folder in (self.temporary / "weights", self.temporary / "optimizer", self.temporary):
            _fsync(folder)
        if (
            self.final.exists()
        ):  # saved before the run was resumed from an earlier step; `keep_last` removes it
            self.final.rename(removed_name(self.final))
        self.temporary.rename(self.final)
        _fsync(self.root)
        keep_last(self.root, self.keep)

    def _manifest(self, dtype: torch.dtype, parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        snapshot, type_name = self.snapshot, str(dtype).removeprefix("torch.")
        tensors = {
            kind: {
                t.name: {"shape": list(t.shape), "dtype": type_name, "parts": parts[f"{kind}/{t.name}"]}
                for t in snapshot.hf_tensors
            }
            for kind in KIND_FILES
        }
        return {
            "format_version": FORMAT_VERSION,
            "step": snapshot.step,
            **snapshot.metadata,
            "tensors": tensors,
            "trainer": {name: fingerprint(value) for name, value in snapshot.trainer.items()},
        }

    def _write_small_files(self, dtype: torch.dtype) -> None:
        path = self.temporary / TRAINER_FILE
        try:
            save_file(self.snapshot.trainer, path, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the operating system's error in text
            raise OSError(f"{path}: {error}") from error
        path.chmod(0o644)  # safetensors leaves the file readable by its owner alone
        _fsync(path)
        texts = dict(self.snapshot.texts)
        for kind, files in self._files(dtype).items():
            for (
                file
            ) in files:  # created here: their headers have to be on disk though others wrote the values
                _fsync(self.temporary / file.name)
            if kind == "master" and len(files) > 1:
                texts[KIND_FILES[kind] + INDEX_SUFFIX] = index_text(files)
        for name, text in texts.items():
            write_atomically(self.temporary / name, text)

    def _files(self, dtype: torch.dtype) -> dict[Kind, list[TensorFile]]:
        return {kind: files_of(self.snapshot.hf_tensors, kind, dtype) for kind in KIND_FILES}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by torch from a path."""
        return False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_snapshot(
    snapshot: Snapshot, root: Path, *, axis: Axis = ALONE, keep: int = 0
) -> tuple[Path, frozenset[MetadataIndex]]:
    """Write a checkpoint, all or nothing; every process of the axis calls it and all get the same outcome.

    Args:
        snapshot: this process's.
        root: the run's ``checkpoints`` folder.
        axis: all processes of the run; its group must be this caller's alone, and able to carry host data.
        keep: checkpoints kept; 0 keeps all.

    Returns:
        The checkpoint's folder, and what this process wrote of it: `take_snapshot` needs to copy no more.

    Raises:
        OSError: the disk is full or the place cannot be written on some process; what was there before is untouched.
        StorageError: a file read back does not hold the live tensors' values.
    """
    planner, writer = BlockSavePlanner(snapshot), CheckpointWriter(snapshot, root, keep)
    try:
        if axis.group is None:
            _save_alone(planner, writer)
        else:
            save({}, storage_writer=writer, planner=planner, process_group=axis.group)
    except CheckpointException as error:
        raise first_failure(error) from error
    finally:
        if axis.rank == 0:  # after a success there is none
            shutil.rmtree(writer.temporary, ignore_errors=True)
    return writer.final, planner.mine


def _save_alone(planner: BlockSavePlanner, writer: CheckpointWriter) -> None:
    """What ``dcp.save`` does with one process, without its warning that there is only one."""
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    [plan] = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner)
    writer.finish(metadata, [results.wait()])


def first_failure(error: CheckpointException) -> Exception:
    """The error of the first process that had one, as the same kind of error everywhere."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError):
        if cause.errno is None:
            return OSError(f"{cause} (rank {rank})")
        return OSError(cause.errno, f"{cause.strerror} (rank {rank})", cause.filename)
    if isinstance(cause, UserError):
        return type(cause)(f"{cause} (rank {rank})")
    return RuntimeError(str(error))
