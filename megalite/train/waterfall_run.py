"""The measurement behind a waterfall: plain, clocked and profiled steps of a real trainer in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megalite.config import RunConfig
from megalite.parallel.collectives import barrier, broadcast_object, gather_objects
from megalite.train.flops import peak_flops, table_peak_tflops
from megalite.train.setup import Session
from megalite.train.timer import StepTimer, read_ms
from megalite.train.waterfall import (
    Machine,
    StepTimes,
    Waterfall,
    best_product_tflops,
    build_waterfall,
    mean_times,
    middle_half,
    quantiles,
    take_apart,
)
from megalite.train.waterfall_check import ProfiledStep, mean_profile, profile_step
from megalite.train.waterfall_clock import (
    Clock,
    OpClock,
    PhaseTimer,
    StepStamps,
    group_axes,
    make_clock,
    running,
    transit_ms,
)
from megalite.train.waterfall_ops import Sizes
from megalite_kernels.products import fast_products
from megalite_kernels.timing import copy_bandwidth, measure

GPU_BLOCK = 4
"""Plain steps between two looks at a GPU's clock: the host runs ahead of it, as in training."""
PEAK_BUDGET_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many steps of which kind."""

    warmup: int = 2
    rounds: int = 10
    """Each a plain step (a block of them on a GPU), and with `explain` a clocked one."""
    explain: bool = False
    check: bool = False
    """A profiled step in each round too."""
    process: bool = False
    """Read this process's own time: unmoved by other programs, blind to waiting; one CPU thread only."""

    def steps(self, device: torch.device) -> int:
        """Steps of the trainer that this takes."""
        block = GPU_BLOCK if device.type == "cuda" else 1
        return self.warmup + self.explain + self.check + self.rounds * (block + self.explain + self.check)


@dataclass(slots=True)
class Measured:
    """What one rank has seen."""

    plain_ms: list[float] = field(default_factory=list)
    data_ms: list[float] = field(default_factory=list)
    clocked: list[StepTimes] = field(default_factory=list)
    profiled: list[ProfiledStep] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The result of a measurement, the same on all ranks."""

    tokens_per_step: int
    tokens_per_s: float
    """Of all devices, from the median step."""
    mfu_causal: float
    mfu_full: float
    step_ms: tuple[float, float, float]
    """10th, 50th and 90th percentile."""
    measured_steps: int
    losses: tuple[float, ...]
    machine: Machine
    clock: str
    waterfall: Waterfall | None = None


class Stopwatch:
    """Runs the steps of a session, each kind in its way."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self.session, self.plan = session, plan
        self.trainer = session.trainer
        self.device = self.trainer.mesh.device
        self.clock: Clock = make_clock(self.device, process=plan.process)
        self.axes = group_axes(self.trainer.mesh)
        self.sizes = sizes_of(session)
        self.transit_ms = transit_ms(self.clock) if plan.explain else 0.0
        self.measured = Measured()
        self._step = self.trainer.completed_steps

    def run(self) -> Measured:
        """All steps of the plan."""
        plan, found = self.plan, self.measured
        for _ in range(plan.warmup):
            self.plain()
        if plan.explain:
            self.clocked()
        if plan.check:
            self.profiled()
        found.plain_ms, found.data_ms, found.clocked, found.profiled = [], [], [], []
        for _ in range(plan.rounds):
            self.plain(GPU_BLOCK if self.device.type == "cuda" else 1)
            if plan.explain:
                self.clocked()
            if plan.check:
                self.profiled()
        found.losses = [record["loss"] for record in self.trainer.metrics.flush()]
        return found

    def plain(self, count: int = 1) -> None:
        """Some steps as they are in training."""
        start, waits = self.clock.now(), 0.0
        results = [self._train_step() for _ in range(count)]
        end = self.clock.now()
        self._synchronize()
        for result in results:
            waits += read_ms(result.marks)["data_wait"]
        self.measured.plain_ms.append(self.clock.ms(start, end) / count)
        self.measured.data_ms.append(waits / count)

    def clocked(self) -> None:
        """One step whose ops are stamped."""
        ops = OpClock(self.clock, self.sizes, self.axes)
        if self.clock.kind == "events":
            self._delay()
        with self._timer(PhaseTimer(self.device, ops.mark)), running(ops):
            start = self.clock.now()
            self._train_step()
            end = self.clock.now()
        self._synchronize()
        stamps = StepStamps(ops.stamps, ops.phases, start, end)
        self.measured.clocked.append(take_apart(stamps, self.clock, self.transit_ms))

    def profiled(self) -> None:
        """One step under torch.profiler.

        The weights that travel between steps arrive within it: torch's process groups crash if the profiler that
        saw a collective start is gone when it ends.
        """
        self.trainer.state.settle()

        def settled() -> None:
            self._train_step()
            self.trainer.state.settle()

        step, timer = profile_step(settled, self.device, self.sizes)
        with self._timer(timer):
            self.measured.profiled.append(step())

    def _train_step(self) -> Any:
        self.trainer.mesh.calls.step = self._step + 1
        result, _ = self.trainer.train_step(self._step, self.session.stop)
        self.trainer.metrics.add(result)
        self._step += 1
        return result

    @contextmanager
    def _timer(self, timer: StepTimer) -> Iterator[None]:
        plain, self.trainer.timer = self.trainer.timer, timer
        try:
            yield
        finally:
            self.trainer.timer = plain

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _delay(self) -> None:
        """Keep the device busy while the host fills its queue: at 2 GHz, about as long as a clocked step's host."""
        recent = self.measured.plain_ms[-1] if self.measured.plain_ms else 100.0
        torch.cuda._sleep(int(2e6 * min(2000.0, 50.0 + 2 * recent)))


def sizes_of(session: Session) -> Sizes:
    """What FLOPs of an op depend on, for this rank."""
    config, model = session.config, session.trainer.model
    tokens = config.train.micro_batch_size * config.train.seq_length
    rows: set[int] = set()
    if model.part.head or model.part.embedding:
        vocabulary = model.output if model.part.head else model.embedding
        assert vocabulary is not None
        rows = {vocabulary.valid_rows, vocabulary.weight.shape[0]}
    return Sizes(config.train.seq_length, frozenset(rows), frozenset({tokens}))


def bench(session: Session, plan: Plan, say: Callable[[str], None] = lambda text: None) -> Bench:
    """Measure a session whose configuration has `plan.steps` steps.

    Returns:
        The result, the mean of the ranks, on all of them.
    """
    mesh, config = session.trainer.mesh, session.config
    say("measuring the peak of matrix products and the speed of a copy")
    found = _measure_machine(session) if mesh.is_first else None
    machine: Machine = broadcast_object(found, mesh.world)
    barrier(mesh.world)
    say(f"{plan.steps(mesh.device)} steps")
    began = time.perf_counter()
    measured = Stopwatch(session, plan).run()
    say(f"done in {time.perf_counter() - began:.0f} s")
    ranks: list[Measured] = gather_objects(measured, mesh.world)
    plain = [sum(ms) / len(ms) for ms in zip(*(rank.plain_ms for rank in ranks), strict=True)]
    low, p50, high = quantiles(plain)
    waterfall = None
    if plan.explain:
        times = mean_times(mean_times(middle_half(rank.clocked)) for rank in ranks)
        if table_peak_tflops(mesh.device) is None and best_product_tflops(times) > machine.peak_tflops:
            better = "measured: the fastest matrix product of the step itself"
            machine = replace(machine, peak_tflops=best_product_tflops(times), peak_source=better)
        data_ms = sum(quantiles(rank.data_ms)[1] for rank in ranks) / len(ranks)
        profiler = mean_profile([rank.profiled for rank in ranks], times, plan) if plan.check else None
        waterfall = build_waterfall(
            times, p50, flops=session.flops, tokens=_tokens(config) / mesh.world_size, machine=machine,
            events=mesh.device.type == "cuda", data_ms=data_ms, profiler_ms=profiler,
        )  # fmt: skip
    rate = _tokens(config) / p50 * 1e3
    mfu = [
        rate / mesh.world_size * total / session.flops.mixed_peak(total, machine.peak)
        for total in (session.flops.causal, session.flops.full)
    ]
    return Bench(
        tokens_per_step=_tokens(config), tokens_per_s=rate, mfu_causal=mfu[0],
        mfu_full=mfu[1], step_ms=(low, p50, high), measured_steps=len(plain),
        losses=tuple(measured.losses), machine=machine, clock=make_clock(mesh.device, process=plan.process).kind,
        waterfall=waterfall,
    )  # fmt: skip


def _tokens(config: RunConfig) -> int:
    return config.train.global_batch_size * config.train.seq_length


def _measure_machine(session: Session) -> Machine:
    device, dtype = session.trainer.mesh.device, session.precision.dtype
    bandwidth = copy_bandwidth(device.type)
    table = table_peak_tflops(device)
    fp8 = peak_flops(session.precision, device).fp8 / 1e12 if session.precision.gemm_fp8_tflops else 0.0
    others = {"peak_fp8_tflops": fp8, "copy_bytes_per_s": bandwidth}
    if table is not None:
        return Machine(peak_tflops=table, peak_source="vendor's dense bf16 figure", **others)
    rates = product_rates(session.config, device, dtype)
    name = max(rates, key=rates.__getitem__)
    best, source = rates[name], f"measured: matrix product {name}"
    if session.precision.gemm_peak_tflops > best:
        best, source = (
            session.precision.gemm_peak_tflops,
            "measured at the start of the run: square matrix products",
        )
    return Machine(peak_tflops=best, peak_source=source, **others)


def product_rates(config: RunConfig, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of matrix products by shape (M x N x K): two squares, and those of the model's layers.

    x @ w.T as a layer's forward pass makes it, of random numbers, by torch, and on CPUs by this library too.
    """
    model, tp = config.model, config.parallel.tp
    tokens = config.train.micro_batch_size * config.train.seq_length // config.parallel.cp
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size // tp, model.size_per_head
    queries = model.num_attention_heads * head // tp
    qkv = queries + 2 * max(1, model.kv_heads // tp) * head
    shapes = [
        (2048, 2048, 2048), (4096, 4096, 4096), (tokens, qkv, hidden), (tokens, hidden, queries),
        (tokens, ffn * (2 if model.gated else 1), hidden), (tokens, hidden, ffn), (tokens, hidden, qkv),
    ]  # fmt: skip
    generator = torch.Generator(device=device).manual_seed(0)
    makers = fast_products(dtype, device)
    products: dict[str, Callable[[], object]] = {}
    flops: dict[str, float] = {}
    for m, n, k in dict.fromkeys(shapes):
        x, w = (torch.randn(s, generator=generator, device=device).to(dtype) for s in ((m, k), (n, k)))
        for by, product in makers.items():
            name = f"{m} x {n} x {k} by {by}"
            products[name], flops[name] = product(x, w.t()), 2.0 * m * n * k
    timings = measure(products, rounds=8, device=device.type, budget_s=PEAK_BUDGET_S)
    return {name: flops[name] / timing.best_ms / 1e9 for name, timing in timings.items()}
