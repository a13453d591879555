"""These tests run the CUDA kernels in the emulator: `make test-cuda` sets MEGALITE_CUDA_EMULATE for them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

EMULATED = os.environ.get("MEGALITE_CUDA_EMULATE", "") != ""
collect_ignore_glob = [] if EMULATED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _emulated() -> None:
    if not EMULATED:  # a file of tests that is named on the command line is collected all the same
        pytest.skip("MEGALITE_CUDA_EMULATE is not set: see `make test-cuda`")


@pytest.fixture(autouse=True)
def _outputs_start_as_nan() -> Iterator[None]:
    """What `torch.empty` gives is NaN here: an element that a kernel forgets is then wrong, and not old memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(before)
