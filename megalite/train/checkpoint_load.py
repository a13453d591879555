"""Loading: any layout from any layout. Every process reads the stored parts that its own boxes lie in."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megalite.errors import StorageError, UserError
from megalite.interop.tensor_file import get_tensor, open_tensors
from megalite.models.families import HfTensor
from megalite.parallel.mesh import ALONE, Axis
from megalite.parallel.pieces import write_values
from megalite.parallel.state import ModelState
from megalite.train.checkpoint import MANIFEST, TRAINER_FILE, part_view, read_parts, stored_parts
from megalite.train.checkpoint_blocks import KIND_FILES, Block, Extent, blocks_of, makes_up
from megalite.train.checkpoint_save import first_failure
from megalite.train.fingerprint import fingerprint


class BlockLoadPlanner(LoadPlanner):
    """Says what is read: for each block of this process the stored parts that it overlaps.

    Args:
        blocks: views of the live state.
        hf_tensors: every tensor of the model: the processes together must take all of each.
    """

    def __init__(self, blocks: Sequence[Block], hf_tensors: Sequence[HfTensor]) -> None:
        self.blocks = {MetadataIndex(block.key, block.offset): block for block in blocks}
        self.hf_tensors = hf_tensors
        self.metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Remember what is stored."""
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """The intersections of this process's blocks with the stored parts."""
        assert self.metadata is not None
        wanted: dict[str, list[ChunkStorageMetadata]] = {}
        for block in self.blocks.values():
            chunk = ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.shape))
            wanted.setdefault(block.key, []).append(chunk)
        items: list[ReadItem] = []
        for key, chunks in wanted.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, chunks)
        taken = [
            (block.key, (block.offset, block.shape)) for block in self.blocks.values() if not block.second
        ]
        return LoadPlan(items, planner_data=taken)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are, if together they take every element of every tensor."""
        taken: dict[str, set[Extent]] = {}
        for key, extent in (entry for plan in global_plan for entry in plan.planner_data):
            taken.setdefault(key, set()).add(extent)
        for kind in KIND_FILES:
            for tensor in self.hf_tensors:
                extents = taken.get(f"{kind}/{tensor.name}", set())
                if not makes_up(tensor.shape, extents):
                    raise RuntimeError(f"not all of {tensor.name} ({kind}) would be loaded by some process")
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: all that is stored is tensors."""
        raise AssertionError("checkpoints hold tensors alone")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the values of an intersection go: the live state, or memory from which `commit_tensor` takes them."""
        block = self.blocks[read_item.dest_index]
        if block.remainder is not None:
            return torch.empty(read_item.lengths, dtype=block.dtype)
        return part_view(block.live, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Masters in two parts are taken apart; anything else is in the live state already."""
        block = self.blocks[read_item.dest_index]
        if block.remainder is not None:
            live, rest = (
                part_view(x, read_item.dest_offsets, read_item.lengths) for x in (block.live, block.remainder)
            )
            write_values(live, rest, tensor)


class CheckpointReader(StorageReader):
    """Reads parts of a checkpoint, each compared with its fingerprint before anything of it is used."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.parts = {MetadataIndex(part.key, part.offset): part for part in stored_parts(manifest)}
        self.manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest in torch's words."""
        found: dict[str, Any] = {}
        for kind, tensors in self.manifest["tensors"].items():
            for name, entry in tensors.items():
                properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
                chunks = [
                    ChunkStorageMetadata(torch.Size(p["offset"]), torch.Size(p["shape"]))
                    for p in entry["parts"]
                ]
                found[f"{kind}/{name}"] = TensorStorageMetadata(
                    properties, torch.Size(entry["shape"]), chunks
                )
        return Metadata(found)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: files are opened when something in them is wanted."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every intersection into its place.

        Raises (from the future's maker):
            StorageError: a file is missing, damaged, or holds other tensors than the manifest lists.
        """
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for part, value in read_parts(self.folder, self.manifest, [self.parts[index] for index in wanted]):
            part.check(value, self.folder)
            for item in wanted[MetadataIndex(part.key, part.offset)]:
                target = planner.resolve_tensor(item)
                target.copy_(part_view(value, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by torch from a path."""
        return False


def load_state(
    folder: Path,
    manifest: dict[str, Any],
    state: ModelState,
    hf_tensors: list[HfTensor],
    *,
    axis: Axis = ALONE,
    tied_rank: int = 0,
) -> dict[str, Tensor]:
    """Fill masters, moments and weights from a checkpoint of any layout; returns the trainer's tensors.

    Every element of every tensor is filled, and every stored element used; all processes of the axis call it.

    Args:
        folder: the checkpoint.
        manifest: what `read_manifest` read from it.
        state: the live state.
        hf_tensors: the family's map from pieces to files' tensors.
        axis: all processes of the run.
        tied_rank: this process's place among the stages that share a tied weight.

    Raises:
        UserError: the stored model is not this model.
        StorageError: stored values differ from their fingerprints.
    """
    check_model(folder, manifest, hf_tensors)
    state.zero_state()  # what no piece covers (padding) must not keep what the memory held before
    blocks = list(blocks_of(state, hf_tensors, tied_rank=tied_rank))
    planner, reader = BlockLoadPlanner(blocks, hf_tensors), CheckpointReader(folder, manifest)
    try:
        if axis.group is None:
            _load_alone(planner, reader)
        else:
            load({}, storage_reader=reader, planner=planner, process_group=axis.group)
    except CheckpointException as error:
        raise first_failure(error) from error
    state.copy_master_to_weights()
    return _load_trainer_state(folder, manifest)


def _load_alone(planner: BlockLoadPlanner, reader: CheckpointReader) -> None:
    """What ``dcp.load`` does with one process, without its warning that there is only one."""
    planner.set_up_planner({}, reader.read_metadata())
    [plan] = planner.create_global_plan([planner.create_local_plan()])
    reader.read_data(planner.finish_plan(plan), planner).wait()


def check_model(folder: Path, manifest: dict[str, Any], hf_tensors: Sequence[HfTensor]) -> None:
    """Compare the manifest's tensors with those of a model.

    Raises:
        UserError: one is missing, has no place, or its parts do not make it up; the message names it.
    """
    shapes = {t.name: t.shape for t in hf_tensors}
    for kind in KIND_FILES:
        stored = manifest["tensors"].get(kind, {})
        for name, entry in stored.items():
            if shapes.get(name) != tuple(entry["shape"]):
                raise UserError(
                    f"{folder}: tensor {name} of shape {entry['shape']} ({kind}) has no place in this model"
                )
            if not makes_up(
                entry["shape"], [(tuple(p["offset"]), tuple(p["shape"])) for p in entry["parts"]]
            ):
                raise StorageError(f"{folder}: the stored parts of {name} ({kind}) do not make up the tensor")
        missing = [t for t in hf_tensors if t.name not in stored]
        if missing:
            pieces = ", ".join(part.piece for part in missing[0].parts)
            raise UserError(
                f"{folder}: nothing stored for {missing[0].name} ({kind} of {pieces}) of this model"
            )


def _load_trainer_state(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / TRAINER_FILE
    state: dict[str, Tensor] = {}
    with open_tensors(path) as stored:
        if odd := sorted(set(stored.keys()) ^ manifest["trainer"].keys()):
            raise StorageError(f"{path}: tensors {odd} are missing or not in {MANIFEST}")
        for name, expected in manifest["trainer"].items():
            state[name] = get_tensor(stored, name, path).clone()
            if fingerprint(state[name]) != expected:
                raise StorageError(f"{path}: {name} is damaged")
    return state
