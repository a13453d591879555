"""Unmodified megatron-core on CPU and gloo: what it asks of ``torch.cuda`` is answered by the CPU.

For processes of their own only: importing megatron-core changes torch's global state, which nothing undoes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

REASON = "needs megatron-core: pip install --no-deps megatron-core==0.16.1"
CPU = torch.device("cpu")


class _DeviceIsCpu(TorchFunctionMode):
    """Every ``device="cuda"`` means the CPU, and a tensor on the CPU says that its type is CUDA's.

    Megatron makes its buffers on "cuda" by name, and its optimizers tell fp32 from 16-bit parameters by the
    string that ``Tensor.type()`` returns.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        if function is torch.Tensor.cuda:
            return args[0]
        value = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(value, str):
            return value.replace("torch.", "torch.cuda.")
        return value


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Within it, code that was written for GPUs runs on the CPU."""
    answers = {"current_device": lambda: CPU, "synchronize": lambda *_: None}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_DeviceIsCpu())
        yield


class TorchNorm:
    """Megatron's own wrapper of torch's norms refuses sequence parallelism; as a layer of a spec, this takes it.

    Its parameters carry the mark by which Megatron sums their gradients over the tensor-parallel ranks.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        make = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = make(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
