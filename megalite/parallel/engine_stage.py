"""A stage of torch.distributed.pipelining that keeps received tensors no longer than they are needed.

The engine's own stage holds a receive buffer for every micro-batch of the step, forth and back, for the whole run:
43 GB for a 70B model in five stages a rank and 32 micro-batches, where the schedule itself keeps a fraction of that in
flight. Here a buffer is made when its receive is posted; once computation has taken it, only the graph holds it.
"""

from __future__ import annotations

from typing import Any

import torch


class LeanBuffers:
    """To be put before the engine's `PipelineStage`: buffers live from the receive to the pass that uses them.

    Importing the engine takes 2 s, which runs without a pipeline need not pay: `make_lean_stage` does it.
    """

    device: torch.device
    args_recv_info: dict[int, Any]
    grad_recv_info: dict[int, Any]
    has_backward: bool
    is_last: bool

    def _setup_forward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        self._on_meta(super()._setup_forward_recv_info, *args, **kwargs)  # type: ignore[misc]

    def _setup_backward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        self._on_meta(super()._setup_backward_recv_info, *args, **kwargs)  # type: ignore[misc]

    def _on_meta(self, setup: Any, *args: Any, **kwargs: Any) -> None:
        """Let the engine describe what will be received without allocating it."""
        device, self.device = self.device, torch.device("meta")
        try:
            setup(*args, **kwargs)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)  # type: ignore[misc]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)  # type: ignore[misc]

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_activations(fwd_chunk_id)  # type: ignore[misc]
        _let_go(self.args_recv_info[fwd_chunk_id])
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_grads(bwd_chunk_id)  # type: ignore[misc]
        _let_go(self.grad_recv_info[bwd_chunk_id])
        return received

    def _allocate(self, infos: Any) -> None:
        for info in infos:
            if not info.is_root_arg and info.tensor_meta is not None:
                meta = info.tensor_meta
                info.buffer = torch.empty_strided(
                    meta.shape, meta.stride, dtype=meta.dtype, device=self.device
                )


def _let_go(infos: Any) -> None:
    for info in infos:
        info.buffer = None


def make_lean_stage(*args: Any, **kwargs: Any) -> Any:
    """The engine's `PipelineStage` of these arguments with `LeanBuffers`."""
    from torch.distributed.pipelining import PipelineStage

    return type("LeanStage", (LeanBuffers, PipelineStage), {})(*args, **kwargs)
