"""Micro-batches brought to a GPU beside the computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalite.data.loader import MicroBatch


class CopyStream:
    """Copies to a device on a stream of its own: a step's data arrives while the step before it computes.

    The host issues a step while the device is still busy with the one before. On the computation's stream the copy
    would stand behind that; here it starts at once, and the computation waits for its end on the device only. The
    copies read page-locked memory (`TrainLoader(pin_memory=True)`), which torch keeps until they are done. On other
    devices than CUDA's it is a plain copy.

    Args:
        device: where the batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The same micro-batches on the device, ready for what the current stream runs next."""
        if self._stream is None:
            return [batch.to(self.device) for batch in batches]
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            there = [batch.to(self.device, non_blocking=True) for batch in batches]
        compute.wait_stream(self._stream)
        for batch in there:
            # Its memory is not handed out again before the computation that reads it is over.
            batch.map(lambda x: _used_on(x, compute))
        return there


def _used_on(x: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    x.record_stream(stream)
    return x
