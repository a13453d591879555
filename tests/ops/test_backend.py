"""Choosing a backend: preference, forcing, missing ones, and the explanation."""

from __future__ import annotations

import threading

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels import backend
from tests.ops.catalogue import needs_native, random


@pytest.fixture
def toy_op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op with a reference, a "cpu" backend for float32 only, and one that needs a missing package."""
    monkeypatch.setattr(backend, "_implementations", {})
    backend.register("toy", "reference", lambda x: "reference")
    backend.register(
        "toy",
        "cpu",
        lambda x: "cpu",
        supports=lambda x: None if x.dtype == torch.float32 else f"not {x.dtype}",
    )
    backend.register_lazy("toy", "sdpa", "absent_package.ops:toy", requires="absent_package")
    return "toy"


def run(op: str, dtype: torch.dtype = torch.float32) -> object:
    return backend.dispatch(op)(torch.ones(1, dtype=dtype))


def test_the_first_that_supports_the_arguments_runs(toy_op: str) -> None:
    assert run(toy_op) == "cpu"
    assert run(toy_op, torch.float64) == "reference"


def test_forcing_is_exact_and_ends_with_the_block(toy_op: str) -> None:
    with mk.use_backend("reference"):
        assert run(toy_op) == "reference"
        with mk.use_backend("cpu"):
            assert run(toy_op) == "cpu"
        assert run(toy_op) == "reference"
    assert run(toy_op) == "cpu"


def test_several_names_are_tried_in_order(toy_op: str) -> None:
    with mk.use_backend("sdpa", "cpu", "reference"):
        assert run(toy_op) == "cpu"
        assert run(toy_op, torch.float64) == "reference"
    with (
        mk.use_backend("sdpa", "cpu"),
        pytest.raises(ValueError, match=r"absent_package.*cpu: not torch.float64"),
    ):
        run(toy_op, torch.float64)
    with pytest.raises(ValueError, match="no backend is named: use one of"), mk.use_backend():
        pass


def test_forcing_reaches_other_threads(toy_op: str) -> None:
    results: list[object] = []
    with mk.use_backend("reference"):
        thread = threading.Thread(target=lambda: results.append(run(toy_op)))
        thread.start()
        thread.join()
    assert results == ["reference"]


def test_a_forced_backend_that_cannot_run_is_an_error_with_the_reason(toy_op: str) -> None:
    with (
        mk.use_backend("cpu"),
        pytest.raises(ValueError, match=r"no backend for toy on cpu \(cpu: not torch.float64\)"),
    ):
        run(toy_op, torch.float64)
    with (
        mk.use_backend("sdpa"),
        pytest.raises(
            ValueError, match=r"absent_package does not import.*Backends of this op here: reference, cpu"
        ),
    ):
        run(toy_op)


def test_an_unknown_name_lists_the_known_ones(toy_op: str) -> None:
    message = r"backend 'cuda13' is not known: use one of cpu, reference, sdpa"
    with pytest.raises(ValueError, match=message), mk.use_backend("cuda13"):
        pass


def test_explain_says_why(toy_op: str) -> None:
    (choice,) = mk.explain("cpu")
    assert (choice.op, choice.backend) == ("toy", "cpu")
    with mk.use_backend("sdpa"):
        (choice,) = mk.explain("cpu")
    assert choice.backend == "none"
    assert "absent_package does not import" in choice.passed_over["sdpa"]
    assert "toy" in str(mk.explain("cpu"))


def test_every_op_has_a_reference() -> None:
    assert all("reference" in by_name for by_name in backend._implementations.values())


@needs_native
def test_the_native_library_serves_the_cpu() -> None:
    chosen = {choice.op: choice.backend for choice in mk.explain("cpu")}
    # No CPU multiplies FP8: there it is emulated, to try its numerics, behind the native norms and activations.
    assert {op for op, name in chosen.items() if name != "cpu"} == {
        op for op in chosen if op.startswith("fp8_") and not op.endswith("_fwd")
    }


@needs_native
def test_dtypes_that_the_native_library_lacks_run_on_the_reference() -> None:
    x, weight = random(3, 8), torch.ones(8)
    y = mk.rms_norm(x.double(), weight.double())
    with mk.use_backend("reference"):
        assert torch.equal(y, mk.rms_norm(x.double(), weight.double()))
    with (
        mk.use_backend("cpu"),
        pytest.raises(ValueError, match=r"takes bfloat16, float16 and float32, not torch.float64"),
    ):
        mk.rms_norm(x.double(), weight.double())
