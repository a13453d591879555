"""Plain data parallelism and ZeRO-1 on flat buffers (`megalite.parallel.buckets`).

Every parameter becomes a view of its group's buffer. What data parallelism reduces is a bucket of it, in place: each
rank gets the sum of the slice that it owns. The optimizer updates the owned slices, and gathering the buckets brings
the new weights to all ranks. With ZeRO-1 the masters and moments exist for owned slices only; with zero=0 every rank
owns everything, gradients are all-reduced, and nothing is gathered.

Weights exist twice when the compute type is not fp32: a low-precision copy that the model uses, and the fp32 master
that the optimizer updates. In fp32 the two are the same tensor. In bf16 the weight is the upper half of its master,
rounded, and only the other 16 bits are kept beside it; without these remainders masters are tensors of their own.
Bytes per parameter with n ranks sharding: fp32 8 + 8 / n, bf16 6 + 10 / n, without remainders 6 + 12 / n.

A single process on a CPU has nothing to sum, so its gradients need no buffer that is always there: from the start of a
step they lend their memory, and each bucket has some again when its first gradient comes. By then the layers behind it
have given back their activations, which stood there; a second micro-batch finds all gradients there. On an AMD EPYC
with AVX2 `benchmarks/train_throughput.py` finds 113 MB above the state of gpt2-124m in bf16 where it found 454, and
113 of llama-60m for 280. On GPUs one launch updates one buffer, and ranks that sum gradients do it in large buckets.

Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054 (stage 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megalite.config import ParallelConfig
from megalite.parallel.buckets import Bucket, Slot, make_group, plan_slots
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.gathering import WeightGatherer
from megalite.parallel.gradients import GradientSink, set_sink
from megalite.parallel.mesh import ALONE, Mesh
from megalite.parallel.partial import box_copies, box_norms, sum_partial
from megalite.parallel.pieces import Box
from megalite.parallel.reduction import GradientReducer, is_finite
from megalite.parallel.state import Kind, OptimizerShard


def lent_together(parallel: ParallelConfig) -> int:
    """Elements at which a bucket is closed whose main gradients lend their memory: 4 MB, a part of a layer.

    A model without a matrix of as many has little to lend.
    """
    return min(parallel.bucket_size, 1 << 20)


class FlatBuffers:
    """All parameters of a model, moved into flat buffers: a `ModelState`.

    Args:
        model: parameters on one device, in fp32 (or wider). They become views of the new buffers, in `dtype`.
        mesh: gradients are summed over `data`; `shard` divides the state with `parallel.zero` = 1.
        dtype: compute type of the weights; the masters keep the values given.
        parallel: bucket_size (where gradients are summed), grad_reduce_dtype and zero: 0 divides nothing.
        remainders: bf16 weights and 16 bits more are the masters (`OptimizerConfig.store_param_remainders`).
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        dtype: torch.dtype,
        parallel: ParallelConfig,
        *,
        remainders: bool = True,
    ) -> None:
        self.mesh = mesh
        divided = parallel.zero != 0
        largest = max(parameter.numel() for parameter in model.parameters())
        lends = mesh.world_size == 1 and mesh.device.type == "cpu" and largest >= lent_together(parallel)
        size = lent_together(parallel) if lends else parallel.bucket_size
        self.shard = mesh.shard if divided else ALONE
        self.replicate = mesh.replicate if divided else mesh.data
        plans = [plan_slots(model, decay, size, large_alone=lends) for decay in (True, False)]
        self.groups = [
            make_group(plan, dtype, self.shard, mesh.data.size, remainders=remainders, lends=lends)
            for plan in plans
            if plan
        ]
        # One order for all ranks, about that in which the backward pass completes buckets: each waits for the
        # parameter that was registered first in it.
        buckets = [bucket for group in self.groups for bucket in group.buckets]
        self.buckets = sorted(buckets, key=lambda bucket: -bucket.slots[-1].number)
        # The largest stays: it would wait for the longest hole. Mostly it is the head's alone, whose gradient comes
        # first, while all activations are there.
        stays = max(self.buckets, key=lambda bucket: bucket.main_grad.numel())
        self.lenders = [bucket for bucket in self.buckets if lends and bucket is not stays]
        """Whose main gradients have no memory from the start of a step to their first gradient."""
        in_model_order = sorted(self._slots(), key=lambda pair: pair[1].number)
        self._boxes: dict[Kind, list[Box]] = {
            kind: [box for bucket, slot in in_model_order for box in bucket.boxes(slot, kind)]
            for kind in ("master", "exp_avg", "exp_avg_sq", "main_grad")
        }
        self._copies = box_copies(self._boxes["main_grad"], mesh, self.replicate.size)
        wide = self.buckets[0].main_grad.dtype
        wire = torch.bfloat16 if parallel.grad_reduce_dtype == "bf16" else wide
        self.reducer = GradientReducer(
            self.buckets, self.shard, self.replicate, wire, watch=mesh.world_size > 1
        )
        self.gatherer = WeightGatherer(model, self.buckets[::-1], self.shard)
        self._sinks: list[GradientSink] = []
        self._hooks = [
            self._catch_gradient(bucket, i, j)
            for i, bucket in enumerate(self.buckets)
            for j in range(len(bucket.slots))
        ]

    def _slots(self) -> Iterator[tuple[Bucket, Slot]]:
        for bucket in self.buckets:
            for slot in bucket.slots:
                yield bucket, slot

    def _catch_gradient(self, bucket: Bucket, index: int, number: int) -> RemovableHandle:
        """Add a parameter's gradients to its main gradient, whichever way they come.

        A layer that knows sinks accumulates a matrix's gradient itself, and autograd then has none for it.
        """
        slot, arrived = bucket.slots[number], self.reducer.arrived
        view = slot.view(bucket.main_grad)
        sink = GradientSink(view, lambda: arrived(index, number), bucket.take_gradients)
        self._sinks.append(sink)
        if slot.parameter.dim() == 2:
            set_sink(slot.parameter, sink)

        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:
                sink.add_gradient(parameter.grad)
                parameter.grad = None

        return slot.parameter.register_post_accumulate_grad_hook(add)

    def start_step(self, num_microbatches: int) -> None:
        """See `ModelState`."""
        for bucket in self.lenders:
            bucket.lend_gradients()
        for sink in self._sinks:
            sink.start()
        self.reducer.start_step(num_microbatches)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """See `ModelState`."""
        for sink in self._sinks:
            sink.finish()
        self.reducer.finish()
        sum_partial(self._boxes["main_grad"], self.mesh.tp)
        tied = [bucket.main_grad[bucket.own] for bucket in self.buckets if bucket.tied]
        assert len(tied) <= 1, "one end of a pipeline holds one of the two copies"
        for gradient in tied:
            all_reduce_sum(gradient, self.mesh.tied)

    def local_finite(self) -> Tensor:
        """See `ModelState`; of the step whose gradients were finished last."""
        if self.reducer.watch:
            return self.reducer.local_finite()
        return is_finite(box_norms(self.boxes("main_grad"), self.mesh.device)).all()

    def optimizer_shards(self) -> list[OptimizerShard]:
        """See `ModelState`: one for each rule of weight decay; where ranks divide the state, or gradients lend their
        memory, one for each bucket."""
        self.settle()
        return [shard for group in self.groups for shard in group.shards()]

    @torch.no_grad()
    def publish(self) -> None:
        """See `ModelState`."""
        self.gatherer.start()

    def settle(self) -> None:
        """See `ModelState`."""
        self.gatherer.settle()

    def boxes(self, kind: Kind) -> list[Box]:
        """See `ModelState`."""
        self.settle()
        if kind == "main_grad" and not all(bucket.has_gradients for bucket in self.lenders):
            raise RuntimeError(
                "this step's gradients are not all there: call finish_gradients() before reading them"
            )
        return self._boxes[kind]

    def box_copies(self) -> list[int]:
        """See `ModelState`."""
        return self._copies

    def zero_state(self) -> None:
        """See `ModelState`."""
        for bucket in self.buckets:
            weights = bucket.weights[bucket.own]
            for tensor in (weights, bucket.master, bucket.remainder, bucket.exp_avg, bucket.exp_avg_sq):
                if tensor is not None:
                    tensor.zero_()

    @torch.no_grad()
    def copy_master_to_weights(self) -> None:
        """See `ModelState`."""
        for bucket in self.buckets:
            if bucket.master is not None:  # else the weights are a part of it
                bucket.weights[bucket.own].copy_(bucket.master)
        self.publish()
        self.settle()

    def release(self) -> None:
        """See `ModelState`."""
        self.gatherer.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for _, slot in self._slots():
            set_sink(slot.parameter, None)
