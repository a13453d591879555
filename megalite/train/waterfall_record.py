"""A measurement as plain values: what ``megalite bench --json`` prints and a run's folder keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megalite.train.waterfall import Waterfall, agreement_problems
from megalite.train.waterfall_run import Bench


def as_record(result: Bench, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement and what it was measured on, ready for JSON."""
    low, p50, high = result.step_ms
    record: dict[str, Any] = {
        "benchmark": "bench",
        **facts,
        "tokens_per_s": result.tokens_per_s,
        "mfu_causal": result.mfu_causal,
        "mfu_full": result.mfu_full,
        "step_ms_p10": low,
        "step_ms_p50": p50,
        "step_ms_p90": high,
        "measured_steps": result.measured_steps,
        "tokens_per_step": result.tokens_per_step,
        "clock": result.clock,
        "peak_tflops": result.machine.peak_tflops,
        "peak_fp8_tflops": result.machine.peak_fp8_tflops or None,
        "peak_source": result.machine.peak_source,
        "copy_bytes_per_s": result.machine.copy_bytes_per_s,
        "losses": list(result.losses),
    }
    return record if result.waterfall is None else record | _waterfall(result.waterfall)


def _waterfall(waterfall: Waterfall) -> dict[str, Any]:
    return {
        "ideal_ms": waterfall.ideal_ms,
        "parts": [
            {**dataclasses.asdict(part), "mfu_points": 100 * part.share, "difference": part.difference}
            for part in waterfall.parts
        ],
        "clock_ms": waterfall.clock_ms,
        "clocked_step_ms": waterfall.clocked_step_ms,
        "flops_counted": waterfall.flops_counted,
        "flops_model": waterfall.flops_model,
        "ops": list(waterfall.ops),
        "unknown_ops": list(waterfall.unknown_ops),
        "problems": agreement_problems(waterfall),
    }
