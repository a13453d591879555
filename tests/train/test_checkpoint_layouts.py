"""One checkpoint, any layout: the same bytes whoever writes it, the same values whoever reads it."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite.errors import StorageError
from megalite.models.families import hf_tensors
from megalite.parallel.mesh import Axis
from megalite.train.checkpoint import read_manifest, verify_folder
from megalite.train.checkpoint_blocks import makes_up
from megalite.train.checkpoint_load import load_state
from megalite.train.checkpoint_save import write_snapshot
from megalite.train.checkpoint_snapshot import Snapshot, take_snapshot
from megalite.train.saver import Saver
from tests.parallel.layouts import MODELS
from tests.train.boxed_state import KINDS, BoxedState, Layout

LAYOUTS = {
    "tp2·pp2·dp2": Layout(2, 2, 2),
    "tp2·pp2·dp2 zero 0": Layout(2, 2, 2, "none"),
    "tp2·pp2·dp2 zero 3": Layout(2, 2, 2, "rows"),
    "tp4·dp2": Layout(tp=4, dp=2),
    "dp8": Layout(dp=8),
    "dp8 zero 3": Layout(dp=8, division="rows"),
}
TRAINER = {"step_count": torch.tensor(3.0), "history": torch.arange(4.0).double()}


def own_axis() -> Axis:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))
    return Axis(dist.get_world_size(), dist.get_rank(), group)


def snapshot_of(name: str, state: BoxedState, step: int = 3) -> Snapshot:
    return take_snapshot(
        state,
        hf_tensors(MODELS[name]),
        TRAINER,
        step=step,
        metadata={"tokens": 7},
        texts={"weights/config.json": "{}"},
        tied_rank=state.tied_rank,
    )


def save_job(name: str, layout: Layout, root: Path) -> int:
    """Save; how many elements this rank holds."""
    state = BoxedState(MODELS[name], layout, dist.get_rank())
    write_snapshot(snapshot_of(name, state), root, axis=own_axis())
    return sum(box.tensor.numel() for kind in KINDS for box in state.boxes(kind))


def load_job(name: str, layout: Layout, folder: Path) -> list[str]:
    """Load into memory that holds other values; what is not as it was saved."""
    state = BoxedState(MODELS[name], layout, dist.get_rank(), fill=torch.nan)
    trainer = load_state(
        folder,
        read_manifest(folder),
        state,
        hf_tensors(MODELS[name]),
        axis=own_axis(),
        tied_rank=state.tied_rank,
    )
    wrong = [n for n in TRAINER if not torch.equal(trainer[n], TRAINER[n])]
    return wrong + state.wrong() + ([] if state.updated else ["weights were not set"])


def load_alone(name: str, folder: Path) -> list[str]:
    state = BoxedState(MODELS[name], Layout(), 0, fill=torch.nan)
    load_state(folder, read_manifest(folder), state, hf_tensors(MODELS[name]))
    return state.wrong()


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def from_one(tmp_path_factory) -> dict[str, Path]:
    """Each model saved by one process."""
    return {
        name: write_snapshot(
            snapshot_of(name, BoxedState(config, Layout(), 0)), tmp_path_factory.mktemp("one") / name
        )[0]
        for name, config in MODELS.items()
    }


def every_other(first: int) -> list[tuple[str, str]]:
    """Half of all models in layouts, each of both: the other test has the other half."""
    pairs = [(name, layout) for name in MODELS for layout in LAYOUTS]
    return [pair for i, pair in enumerate(pairs) if (i // len(LAYOUTS) + i) % 2 == first]


@pytest.mark.parametrize(("name", "layout"), every_other(0))
def test_the_files_do_not_depend_on_the_layout(name, layout, from_one, rank_pool, tmp_path):
    held = rank_pool(8).run(save_job, name, LAYOUTS[layout], tmp_path)
    folder = tmp_path / "step_00000003"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert hashes(folder) == hashes(from_one[name])
    verify_folder(folder, read_manifest(folder))
    stored = sum(3 * math.prod(t.shape) for t in hf_tensors(MODELS[name]))
    assert sum(held) > stored or LAYOUTS[layout].dp == 8, "nothing was held twice: the test shows nothing"
    assert load_alone(name, folder) == []


@pytest.mark.parametrize(("name", "layout"), every_other(1))
def test_any_layout_reads_the_checkpoint_of_one_process(name, layout, from_one, rank_pool):
    assert rank_pool(8).run(load_job, name, LAYOUTS[layout], from_one[name]) == [[]] * 8


@pytest.mark.parametrize("target", ["tp4·dp2", "dp8", "dp8 zero 3", "tp2·pp2·dp2 zero 0"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied"])
def test_any_layout_reads_any_other(name, target, rank_pool, tmp_path):
    rank_pool(8).run(save_job, name, LAYOUTS["tp2·pp2·dp2"], tmp_path)
    assert rank_pool(8).run(load_job, name, LAYOUTS[target], tmp_path / "step_00000003") == [[]] * 8


def failing_job(name: str, layout: Layout, root: Path, full_rank: int, asynchronous: bool) -> list[str]:
    """Save twice, the second time with a full disk on one rank, a third time with room; the errors seen."""
    state = BoxedState(MODELS[name], layout, dist.get_rank())
    saver = Saver(root, keep=2, asynchronous=asynchronous, axis=own_axis())
    real, errors = os.pwrite, []

    def full(descriptor: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (1, 2, 3):
        snapshot = snapshot_of(name, state, step)
        os.pwrite = full if step == 2 and dist.get_rank() == full_rank else real
        try:
            saver.save(snapshot)
            saver.wait()
        except OSError as error:
            errors.append(f"step {step}: {error.errno} {error}")
        finally:
            os.pwrite = real
        if step == 2 and dist.get_rank() == 0:
            errors.append(" ".join(sorted(path.name for path in root.iterdir())))
    return errors


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("full_rank", [0, 3])
def test_one_rank_without_space_fails_the_save_on_all(full_rank, asynchronous, rank_pool, tmp_path):
    layout = Layout(tp=2, pp=2)
    answers = rank_pool(4).run(failing_job, "llama", layout, tmp_path, full_rank, asynchronous)
    assert answers[0].pop() == "step_00000001", "the earlier checkpoint is intact, and nothing else is left"
    for errors in answers:
        [error] = errors
        assert error.startswith(
            f"step 2: {errno.ENOSPC} [Errno {errno.ENOSPC}] No space left on device (rank {full_rank})"
        )
        assert "model.safetensors" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    assert load_alone("llama", tmp_path / "step_00000003") == []


def second_save_job(name: str, layout: Layout, root: Path) -> tuple[int, int, bool]:
    """Elements in a first and in a second snapshot, and whether the second was saved."""
    state = BoxedState(MODELS[name], layout, dist.get_rank())
    saver = Saver(root, keep=1, asynchronous=True, axis=own_axis())
    counts = []
    for step in (1, 2):
        snapshot = take_snapshot(
            state, hf_tensors(MODELS[name]), TRAINER, step=step, metadata={}, texts={}, only=saver.mine
        )
        counts.append(sum(block.values.numel() for block in snapshot.blocks.values()))
        saver.save(snapshot)
        saver.wait()
    return counts[0], counts[1], saver.last_saved == root / "step_00000002"


def test_later_snapshots_hold_only_what_the_rank_writes(from_one, rank_pool, tmp_path):
    answers = rank_pool(4).run(second_save_job, "llama", Layout(dp=4, division="none"), tmp_path)
    for first, second, saved in answers:
        assert saved
        assert first == sum(s for _, s, _ in answers), "without dividing the state every rank holds all of it"
        assert abs(second - first / 4) < 0.02 * first, "what all hold is not spread evenly over them"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    folder = tmp_path / "step_00000002"
    weights = {name: value for name, value in hashes(folder).items() if name.endswith("model.safetensors")}
    assert weights.items() <= hashes(from_one["llama"]).items()


def damaged_job(name: str, layout: Layout, folder: Path) -> str:
    try:
        load_job(name, layout, folder)
    except StorageError as error:
        return str(error)
    return "no error"


def test_damage_that_one_rank_sees_stops_all(from_one, rank_pool, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(from_one["llama"], folder)
    path = folder / "optimizer/exp_avg_sq.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    for message in rank_pool(4).run(damaged_job, "llama", Layout(tp=2, pp=2), folder):
        assert "is damaged; remove" in message
        assert "model.norm.weight" in message


@pytest.mark.parametrize("what", ["a hole", "an overlap"])
def test_a_manifest_whose_parts_are_not_the_tensor_is_refused(what, rank_pool, tmp_path):
    rank_pool(8).run(save_job, "llama", LAYOUTS["dp8"], tmp_path)
    folder = tmp_path / "step_00000003"
    manifest = json.loads((folder / "checkpoint.json").read_text())
    parts = manifest["tensors"]["exp_avg"]["model.embed_tokens.weight"]["parts"]
    assert len(parts) > 1
    if what == "a hole":
        parts.pop(1)
    else:
        parts[1]["offset"][0] -= 1
    with pytest.raises(
        StorageError, match=r"parts of model\.embed_tokens\.weight \(exp_avg\) do not make up"
    ):
        load_state(folder, manifest, BoxedState(MODELS["llama"], Layout(), 0), hf_tensors(MODELS["llama"]))


def test_what_makes_up_a_tensor():
    whole = (4, 6)
    left, right = ((0, 0), (4, 2)), ((0, 2), (4, 4))
    assert makes_up(whole, [right, left])
    assert makes_up(whole, [left, ((0, 2), (1, 4)), ((1, 2), (3, 4)), ((2, 2), (0, 4))])
    assert not makes_up(whole, [left])
    assert not makes_up(whole, [left, left, right])
    assert not makes_up(whole, [left, ((0, 1), (4, 4))])  # as many elements, one column twice and one missing
    assert not makes_up(whole, [((0, 3), (4, 6))])
    assert makes_up((3,), [((2,), (1,)), ((0,), (2,))])
    assert not makes_up((3,), [((1,), (2,)), ((1,), (1,))])
