"""Blocks compiled one by one: element-wise work between our kernels is fused, and Python leaves the inner loop.

All blocks of one kind share one graph, because a graph takes weights and main gradients as inputs. It adds weight
gradients into those itself; what it cannot do is tell Python, so the sinks of a block hear of their gradients at the
edge of the block, when its whole backward pass is done (`announce`). A bucket's reduction therefore starts at the
end of a block, where uncompiled layers start it at the last of its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.layers.attention import Context
from megalite.layers.block import Block
from megalite.layers.cache import LayerCache
from megalite.layers.recompute import KEEP, Recompute
from megalite.models.transformer import Transformer
from megalite.parallel.fp8_weights import get_copies
from megalite.parallel.gradients import announce, get_sink


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Let every block of a model run compiled, each as one whole graph, wherever gradients are needed.

    Before the model is moved into its state, which then waits for the weights of whole blocks. Nothing is compiled
    yet: the first pass does. Other documents of the same total length recompile nothing, except that the second
    value of `max_seqlen` makes it a variable of the graph, once.

    Args:
        model: one process's layers, not cut by tensor parallelism.
        backend: of `torch.compile`.

    Raises:
        ValueError: the model is cut.
    """
    if model.split.axis.group is not None:
        raise ValueError(
            f"blocks cut over {model.split.axis.size} tensor-parallel ranks do not compile: their collectives run "
            "beside the products that hide them, which a graph cannot say. Compile without tensor parallelism"
        )
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.forward = CompiledForward(block, backend)  # type: ignore[method-assign]
        block.runs_whole = True


class CompiledForward:
    """Takes the place of a block's `forward`, behind the block's hooks, which run uncompiled."""

    def __init__(self, block: Block, backend: str) -> None:
        self._weights = [parameter for parameter in block.parameters() if parameter.dim() == 2]
        self._eager = block.forward
        self._compiled = torch.compile(block.forward, fullgraph=True, backend=backend)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        context: Context,
        cache: LayerCache | None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, Tensor]:
        """As `Block.forward`; without gradients (validation, sampling: any length) the uncompiled one."""
        if cache is not None or not torch.is_grad_enabled():
            return self._eager(x, residual, context, cache, recompute)
        if context.cu_seqlens is not None:
            torch._dynamo.mark_dynamic(context.cu_seqlens, 0)
        sinks = [sink for weight in self._weights if (sink := get_sink(weight)) is not None]
        for sink in sinks:
            sink.cleared()  # a graph only adds
        for weight in self._weights:
            if (copies := get_copies(weight)) is not None and copies.live:
                copies.both(weight)  # which a graph only reads
        return self._compiled(announce(x, sinks), residual, context, None, recompute)
