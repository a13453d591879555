"""SIGTERM, SIGINT and SIGUSR1 end a run at the next step boundary, on all processes at the same step.

Batch systems send SIGUSR1 or SIGTERM some time before the end of a job.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from megalite.parallel.mesh import Mesh


class StopSignal:
    """Remembers a signal and lets the processes agree on the step at which they stop.

    Each step's small reduction carries the processes' requests; all of them read the same sum. On GPUs it is
    read one step later, so that the host never waits for the step that is running.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.name = ""
        """Name of the signal that arrived here; empty while there was none."""
        self._previous: dict[int, Any] = {}
        self._in_flight: tuple[Tensor, torch.cuda.Event] | None = None

    def __enter__(self) -> StopSignal:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """A signal arrived at this process."""
        return bool(self.name)

    def agreed(self, requests: Tensor) -> bool:
        """Whether the processes stop now; `requests` is the sum of their requests in this step."""
        if self.mesh.world.group is None:
            return self.requested
        if requests.device.type != "cuda":
            return bool(requests.item())
        before, self._in_flight = self._in_flight, self._copy(requests)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0].item())

    @staticmethod
    def _copy(requests: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty(requests.shape, dtype=requests.dtype, pin_memory=True)
        host.copy_(requests, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event
