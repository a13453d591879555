"""The op tests on another device than the CPU: see catalogue.py."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from tests.ops.catalogue import ABOUT_THE_CPU, DEVICE, KERNELS, WHERE

collect_ignore = [] if WHERE == "cpu" else ABOUT_THE_CPU

if WHERE == "interpreter":
    from tests.helpers.triton_interpreter import correct_bfloat16

    correct_bfloat16()
if WHERE == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError("MEGALITE_TEST_DEVICE=cuda, but torch finds no GPU on this machine")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """On a GPU an op without a kernel of its own runs in plain torch: forcing the kernel is then no test."""
    try:
        return (yield)
    except ValueError as error:
        # CUDA kernels refuse dtypes and options that are left to other back-ends; the skip's reason says which.
        refused = "not implemented for this op" if KERNELS == "triton" else ""
        if (
            WHERE != "cpu"
            and str(error).startswith("no backend for")
            and f"{KERNELS}: {refused}" in str(error)
        ):
            pytest.skip(str(error))
        raise
