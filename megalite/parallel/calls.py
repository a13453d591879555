"""The last collective that this process entered, kept for the message of a run that ends because a rank is gone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CallRecord:
    """What the process does now: written at every collective (0.3 µs), read only when something went wrong.

    One object belongs to a `Mesh` and is shared by all of its axes.
    """

    number: int = 0
    """Collectives entered so far, over all axes."""
    kind: str = ""
    axis: str = ""
    step: int = 0
    """The training step in progress, from 1; 0 before the first."""

    def enter(self, kind: str, axis: str) -> None:
        """Note that a collective is about to start."""
        self.number += 1
        self.kind = kind
        self.axis = axis

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step else ""
        if not self.number:
            return f"before its first collective{step}"
        return f"in {self.kind} over {self.axis} (collective {self.number}{step})"
