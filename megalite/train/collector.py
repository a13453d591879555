"""When Python's garbage collector runs: at chosen steps, the same on all ranks, instead of in the middle of one.

A collection stops a process for some ten milliseconds, and with it every rank that waits for it in a collective.
"""

from __future__ import annotations

import gc


class Collector:
    """Holds the collector off inside a `with` block, except at every `interval`-th step.

    What exists at the beginning is not looked at again (`gc.freeze`). On leaving everything is as it was.

    Args:
        interval: steps between collections; 0 leaves the collector alone.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._was_enabled = False

    def __enter__(self) -> Collector:
        if self.interval:
            self._was_enabled = gc.isenabled()
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self.interval:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def after_step(self, done: int) -> None:
        """Collect if this is the step; called with the number of completed steps."""
        if self.interval and done % self.interval == 0:
            gc.collect()
