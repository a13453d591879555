"""Errors planted into what Hopper's kernels share without assembly: the bits of a descriptor."""

from __future__ import annotations

_PRODUCTS = "tests/cuda/test_hopper.py::test_products"

MUTATIONS = [
    # The two offsets change places; only a transposed operand of several swizzles uses both.
    (
        "descriptor.cuh",
        "uint64_t((leading_bytes & 0x3FFFF) >> 4) << 16 |\n         uint64_t((stride_bytes & 0x3FFFF) >> 4) << 32",
        "uint64_t((stride_bytes & 0x3FFFF) >> 4) << 16 |\n         uint64_t((leading_bytes & 0x3FFFF) >> 4) << 32",
        f"{_PRODUCTS}[128-64-0-1-1-dtype1]",
    ),
    # The names of two swizzles change places.
    (
        "descriptor.cuh",
        "swizzle == 64 ? 2 : swizzle == 32 ? 3",
        "swizzle == 64 ? 3 : swizzle == 32 ? 2",
        f"{_PRODUCTS}[256-32-1-0-0-dtype2]",
    ),
    # One bit of the stride is lost.
    (
        "descriptor.cuh",
        "uint64_t((stride_bytes & 0x3FFFF) >> 4)",
        "uint64_t((stride_bytes & 0x3FF) >> 4)",
        f"{_PRODUCTS}[64-128-0-0-0-dtype0]",
    ),
]
