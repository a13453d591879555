"""A small source folder in the place of csrc/cuda, and a cache folder of the test's own."""

from __future__ import annotations

import pytest

from megalite_kernels.native.cuda import cache, sources

SCALE = """
// Multiplies by FACTOR; the header gives the type.
#include "types.cuh"
#if defined(KERNEL_scale)
extern "C" __global__ void __launch_bounds__(THREADS) scale(real* x, long long count) {
  const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (i < count) x[i] *= real(FACTOR);
}
#endif
"""
TYPES = "#pragma once\nusing real = float;\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with scale.cuh and types.cuh, in which `sources` looks; nothing is remembered of another."""
    place = tmp_path / "csrc"
    place.mkdir()
    (place / "scale.cuh").write_text(SCALE)
    (place / "types.cuh").write_text(TYPES)
    monkeypatch.setattr(sources, "folder", lambda: place)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for function in (sources.closure, sources.identity):
        function.cache_clear()
    yield place
    for function in (sources.closure, sources.identity):
        function.cache_clear()
