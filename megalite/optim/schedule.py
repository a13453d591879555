"""Learning rate as a pure function of the step, so that it needs no state and survives any restart."""

from __future__ import annotations

import math

from megalite.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Warm-up rises linearly and reaches the peak at its last step. Then ``cosine`` falls to the floor over the
    rest of the run, ``wsd`` (warm-up, stable, decay; arXiv 2404.06395) stays at the peak and falls linearly
    over its last `decay` units, ``constant`` stays. Positions are steps, or tokens consumed.
    """
    schedule = config.schedule
    peak = config.optimizer.learning_rate
    if schedule.unit == "steps":
        position, total = step + 1, config.train.steps
    else:
        position = config.train.tokens_before(step + 1)
        total = config.train.tokens_before(config.train.steps)
    if position <= schedule.warmup:
        return peak * position / schedule.warmup
    floor = peak * schedule.min_ratio
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        span = max(1, total - schedule.warmup)
        progress = min(1.0, (position - schedule.warmup) / span)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = schedule.decay or max(1, total // 5)
    remaining = max(0.0, min(1.0, (total - position) / decay))
    return floor + (peak - floor) * remaining
