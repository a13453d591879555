"""Tuning with a stand-in for the timer: what is stored, what is read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import triton

import megalite_kernels as mk
from megalite_kernels.timing import Timing
from megalite_kernels.triton import grad_norm as kernels
from megalite_kernels.triton.launch import Launch, override, tuned_key
from megalite_kernels.triton.tune import neighbours, tune
from tests.ops.catalogue import random

TABLE = kernels.TOTAL
SMALL, WIDE = Launch({"BLOCK": 256}, num_warps=2), Launch({"BLOCK": 2048}, num_warps=8)


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGALITE_TUNED", raising=False)


def run() -> torch.Tensor:
    with mk.use_backend("triton"):
        return mk.grad_norm(random(100))


def timer(milliseconds: Mapping[int, float]) -> Callable[..., dict[str, Timing]]:
    """Says these times, by the warps that were in force when the variant ran."""

    def measure(variants: Mapping[str, Callable[[], object]], **options: object) -> dict[str, Timing]:
        warps, found = [], {}
        launch = kernels.launch

        def watched(kernel: object, grid: object, config: Launch, *args: object, **constants: object) -> None:
            warps.append(config.num_warps)
            launch(kernel, grid, config, *args, **constants)  # type: ignore[arg-type]

        kernels.launch = watched
        try:
            for name, variant in variants.items():
                variant()
                found[name] = Timing(milliseconds[warps[-1]], 0.0, 0.0)
        finally:
            kernels.launch = launch
        return found

    return measure


def test_the_fastest_is_stored_and_read_where_the_variable_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some" / "tuned.json"
    present = TABLE.pick()
    assert tune(TABLE, [SMALL, WIDE], run, path=path, measure=timer({2: 3.0, 4: 2.0, 8: 1.0})) == WIDE
    assert TABLE.pick() == present  # the variable is not set
    (entry,) = json.loads(path.read_text()).items()
    assert entry[0] == f"grad_norm_total interpreter triton-{triton.__version__}" == tuned_key(TABLE.kernel)
    assert entry[1]["median_ms"] == 1.0
    monkeypatch.setenv("MEGALITE_TUNED", str(path))
    assert TABLE.pick() == WIDE
    assert kernels.PARTIAL.pick() == kernels.PARTIAL.entries["default"]
    with override(TABLE.kernel, SMALL):
        assert TABLE.pick() == SMALL
    torch.testing.assert_close(run(), random(100).norm())
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


def test_the_present_choice_competes_and_other_entries_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("MEGALITE_TUNED", str(path))
    path.write_text(json.dumps({"other": {"blocks": {}, "num_warps": 1, "num_stages": 1}}))
    present = TABLE.pick()
    assert tune(TABLE, [SMALL, WIDE], run, measure=timer({2: 3.0, 4: 2.0, 8: 2.5})) == present
    assert set(json.loads(path.read_text())) == {"other", tuned_key(TABLE.kernel)}


def test_an_entry_of_another_compiler_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("MEGALITE_TUNED", str(path))
    entry = {"blocks": dict(SMALL.blocks), "num_warps": 2, "num_stages": 2}
    path.write_text(json.dumps({tuned_key(TABLE.kernel) + ".9": entry}))
    assert TABLE.pick() == TABLE.entries["default"]
    path.write_text(json.dumps({tuned_key(TABLE.kernel): {**entry, "blocks": {"BLOCK_X": 4}}}) + " ")
    with pytest.raises(ValueError, match=r"has blocks \['BLOCK_X'\] for grad_norm_total, which takes"):
        TABLE.pick()


def test_candidates_that_do_not_run_are_passed_over(tmp_path: Path) -> None:
    def fragile() -> object:
        if TABLE.pick().num_warps == 2:
            raise RuntimeError("out of shared memory")
        return run()

    chosen = tune(
        TABLE, [SMALL, WIDE], fragile, path=tmp_path / "t.json", measure=timer({4: 2.0, 8: 1.0, 2: 0.0})
    )
    assert chosen == WIDE


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    with pytest.raises(ValueError, match="MEGALITE_TUNED is not set: name the file"):
        tune(TABLE, [SMALL], run)
    with pytest.raises(ValueError, match="candidates is empty"):
        tune(TABLE, [], run, path=path)
    with pytest.raises(ValueError, match=r"a candidate has blocks \['B'\] for grad_norm_total"):
        tune(TABLE, [Launch({"B": 4})], run, path=path)

    def broken() -> object:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="grad_norm_total does not run as it is: no device"):
        tune(TABLE, [SMALL], broken, path=path)
    assert not path.exists()


def test_neighbours_change_one_thing_at_a_time() -> None:
    found = neighbours(Launch({"A": 64, "B": 1}, num_warps=4, num_stages=1))
    assert [launch.num_warps for launch in found] == [2, 8, 4, 4, 4, 4]
    assert [launch.num_stages for launch in found] == [1, 1, 2, 1, 1, 1]
    assert [tuple(launch.blocks.values()) for launch in found[3:]] == [(32, 1), (128, 1), (64, 2)]


def test_the_projects_timer_fits(tmp_path: Path) -> None:
    chosen = tune(TABLE, neighbours(TABLE.pick())[:1], run, path=tmp_path / "tuned.json")
    assert chosen.blocks == TABLE.pick().blocks
