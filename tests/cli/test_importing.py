"""Commands import without the garbage collector, and leave it as they found it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from megalite.cli.importing import without_collections
from megalite.cli.main import main


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("was_on", [True, False])
def test_no_collection_inside_and_none_of_what_is_there_after(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    gc.unfreeze()
    with without_collections():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled() == was_on
    assert gc.get_freeze_count() > len(made)


def test_an_import_that_fails_leaves_it_on() -> None:
    with pytest.raises(ModuleNotFoundError), without_collections():
        import megalite.no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_command_runs_with_the_collector_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("megalite.cli.plan.main", lambda rest: seen.append(gc.isenabled()) or 0)
    assert main(["plan"]) == 0
    assert seen == [True]
