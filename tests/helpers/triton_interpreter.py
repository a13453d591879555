"""Corrections to Triton's interpreter, which computes on the bit patterns of bfloat16 as if they were integers.

Conversions round to nearest even, arithmetic and comparisons are done in float32 and rounded once, and a dot of 16-bit
operands accumulates in float32, as on a GPU. Its conversions to FP8 cut bits off, or take the patterns for integers:
torch's are put in their place, on magnitudes that the formats hold (beyond those GPUs saturate, older torch does not).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def widened(bits: Any) -> Any:
    """bfloat16 bit patterns as float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrowed(x: Any) -> Any:
    """float32 as bfloat16 bit patterns: nearest even, a NaN stays one."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def narrowed_to_fp8(x: Any, name: str) -> Any:
    """float32 as the bit patterns of an FP8 format: nearest even, a NaN stays one."""
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return values.to(FP8[name]).view(torch.uint8).numpy().reshape(np.shape(x))


def correct_bfloat16() -> None:
    """Replace the interpreter's bfloat16 operations, and conversions to FP8, in this process; a second call does
    nothing."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "corrected", False):
        return
    handle = interpreter.TensorHandle
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
    convert, dot = interpreter._convert_float, builder.create_dot
    binary, unary, cast = builder.binary_op, builder.unary_op, builder.cast_impl

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and str(target) in FP8:
            return narrowed_to_fp8(x, str(target))
        if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return narrowed(x).reshape(x.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return widened(x).reshape(x.shape).view(np.uint32)
        return convert(x, source, target, rounding)

    def wide_handle(value: Any) -> Any:
        if value.dtype.scalar == tl.bfloat16:
            return handle(widened(value.data), tl.float32)
        if value.dtype.scalar == tl.float16:
            return handle(value.data.astype(np.float32), tl.float32)
        return value

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide_handle(a), wide_handle(b), *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16 or op in bitwise:
            return binary(self, left, right, op)
        result = op(widened(left.data), widened(right.data))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(narrowed(result), tl.bfloat16)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return unary(self, value, op)
        return handle(narrowed(op(widened(value.data))), tl.bfloat16)

    def cast_impl(self: Any, value: Any, target: Any) -> Any:
        source, scalar = value.dtype.scalar, target.scalar
        if source == tl.float32 and str(scalar) in FP8:
            return handle(narrowed_to_fp8(value.data, str(scalar)), scalar)
        if source == tl.bfloat16 and scalar not in (tl.bfloat16, tl.float32):
            return cast(self, handle(widened(value.data), tl.float32), target)
        if scalar == tl.bfloat16 and source not in (tl.bfloat16, tl.float32):
            return cast(self, handle(value.data.astype(np.float32), tl.float32), target)
        return cast(self, value, target)

    interpreter._convert_float = convert_float
    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.corrected = True
