"""The waterfall: everything sums, each delay lands in its own part, and FLOPs are those of the formula."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.config import ModelConfig
from megalite.config_values import from_dict
from megalite.models.transformer import Transformer
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.random import initialize
from megalite.train import setup, waterfall_run
from megalite.train.flops import Precision, flops_per_token
from megalite.train.made_up import write_made_up_data
from megalite.train.waterfall import (
    LABELS,
    Machine,
    StepTimes,
    agreement_problems,
    build_waterfall,
    mean_times,
    middle_half,
    take_apart,
)
from megalite.train.waterfall_check import ProfiledStep, mean_profile, profile_step
from megalite.train.waterfall_clock import (
    Clock,
    OpClock,
    StepStamps,
    group_axes,
    make_clock,
    running,
    transit_ms,
)
from megalite.train.waterfall_ops import Classifier, Sizes
from megalite.train.waterfall_run import Plan, Stopwatch, sizes_of
from megalite_kernels import backend
from megalite_kernels.contract import CONTRACTS
from tests.helpers.tiny import tiny_values
from tests.parallel.layouts import MODELS

MACHINE = Machine(peak_tflops=0.1, peak_source="made up", copy_bytes_per_s=10e9)
CPU = torch.device("cpu")
STEPS = Plan(warmup=1, rounds=2, explain=True)
DELAY_MS = 20.0


class Hands:
    """A clock that a test moves: each reading takes a thousandth of a millisecond, and nothing else any time."""

    def __init__(self) -> None:
        self.at = 0.0
        self.clock = Clock("wall", self.read, lambda a, b: b - a)

    def read(self) -> float:
        self.at += 1e-3
        return self.at


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    """The clock of every `Stopwatch`."""
    made = Hands()
    monkeypatch.setattr(waterfall_run, "make_clock", lambda device, process=False: made.clock)
    monkeypatch.setattr(waterfall_run, "transit_ms", lambda clock: 0.0)
    return made


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., setup.Session]]:
    """A trainer of two layers on made-up data; nothing is measured at its start."""
    chosen = Precision("fp32", "fp32", "as configured", 0.1, 0.1)
    monkeypatch.setattr(setup, "choose_precision", lambda requested, device: chosen)
    opened: list[setup.Session] = []

    def make(**recompute: str) -> setup.Session:
        data = write_made_up_data(tmp_path / f"data{len(opened)}", vocab_size=301, tokens=20_000)
        values = tiny_values(data, tmp_path / f"run{len(opened)}")
        values["model"]["vocab_size"] = 301
        values |= {"recompute": recompute, "eval": {"interval": 0}}
        values["train"] |= {"steps": 50, "global_batch_size": 4}
        opened.append(setup.build_session(from_dict(setup.RunConfig, values), Mesh(device=CPU)))
        return opened[-1]

    yield make
    for session in opened:
        session.trainer.loader.close()
        session.trainer.tensorboard.close()
        session.trainer.progress.close()


def clocked(session: setup.Session) -> StepTimes:
    """Mean of a few clocked steps."""
    watch = Stopwatch(session, STEPS)
    watch.run()
    return mean_times(watch.measured.clocked)


def slow(monkeypatch: pytest.MonkeyPatch, hands: Hands, op: str) -> None:
    """One op, or its form that writes in place, takes DELAY_MS."""
    choose = backend.choose

    def slower(name: str, device: str, args: tuple[Any, ...] | None = None) -> Callable[..., Any]:
        implementation = choose(name, device, args)
        if name.rstrip("_") != op:
            return implementation

        def sleepy(*values: Any) -> Any:
            hands.at += DELAY_MS
            return implementation(*values)

        return sleepy

    monkeypatch.setattr(backend, "choose", slower)


def test_parts_sum_to_the_step(open_session) -> None:
    session = open_session()
    watch = Stopwatch(session, STEPS)
    found = watch.run()
    assert len(found.plain_ms) == len(found.clocked) == STEPS.rounds
    assert len(found.losses) == STEPS.steps(CPU)
    for step in found.clocked:
        assert sum(step.ms.values()) == pytest.approx(step.total_ms - step.clock_ms)
    tokens = 4 * 32
    step_ms = found.plain_ms[0]
    waterfall = build_waterfall(
        mean_times(found.clocked), step_ms, flops=session.flops, tokens=tokens, machine=MACHINE
    )
    assert sum(part.share for part in waterfall.parts) + waterfall.mfu_causal == pytest.approx(1)
    assert sum(part.ms for part in waterfall.parts) + waterfall.ideal_ms == pytest.approx(step_ms)
    assert waterfall.mfu_causal == pytest.approx(session.flops.causal * tokens / (step_ms / 1e3) / 0.1e12)
    assert not waterfall.unknown_ops, "give them a line in waterfall_ops.TABLE"
    assert {part.key for part in waterfall.parts} == set(LABELS)


def test_a_slow_op_shows_in_its_own_part(open_session, monkeypatch, hands) -> None:
    session = open_session()
    for op, part, calls in (
        ("glu_fwd", "memory", 4),
        ("attention_bwd", "attention", 4),
        ("linear_weight_grad", "gemm", 16),
        ("linear_cross_entropy_grad", "head", 2),
        ("adamw", "optimizer", 2),
    ):
        with monkeypatch.context() as patch:
            slow(patch, hands, op)
            times = clocked(session)
        assert times.ms[part] == pytest.approx(calls * DELAY_MS, abs=1), op
        assert sum(ms for key, ms in times.ms.items() if key != part) < 5, (op, times.ms)


def test_waiting_for_data_shows(open_session, monkeypatch, hands) -> None:
    session = open_session()
    load = session.trainer.load

    def slow_load(step: int) -> Any:
        hands.at += DELAY_MS
        return load(step)

    monkeypatch.setattr(session.trainer, "load", slow_load)
    times = clocked(session)
    assert times.ms["data"] == pytest.approx(DELAY_MS, abs=0.2)
    assert sum(ms for key, ms in times.ms.items() if key != "data") < 5


def test_recomputed_ops_are_a_part_of_their_own(open_session) -> None:
    plain, again = clocked(open_session()), clocked(open_session(kind="full"))
    assert plain.ms["recompute"] == 0 < again.ms["recompute"]

    def counted(times: StepTimes) -> float:
        return sum(o.flops for (_, part, _), o in times.ops.items() if part != "recompute")

    assert counted(again) == counted(plain)
    assert any(part == "recompute" and o.flops for (_, part, _), o in again.ops.items())


def slow_collective(axis: str) -> dict[str, float]:
    """A sum over two ranks that has to be waited for, and one that has not."""
    hands = Hands()
    mesh = Mesh(device=CPU, **{axis: Axis(2, dist.get_rank(), dist.group.WORLD)})
    ops = OpClock(hands.clock, Sizes(1), group_axes(mesh))
    original, value = dist.Work.wait, torch.ones(4)

    def slow_wait(work: Any, *args: Any) -> Any:
        hands.at += DELAY_MS
        return original(work, *args)

    dist.Work.wait = slow_wait
    try:
        with running(ops):
            start = hands.clock.now()
            dist.all_reduce(value)
            work = dist.all_reduce(value, async_op=True)
            hands.at += DELAY_MS  # the host's own work hides the second one
            ops.mark("communication")
            end = hands.clock.now()
        original(work)
    finally:
        dist.Work.wait = original
    return take_apart(StepStamps(ops.stamps, ops.phases, start, end), hands.clock, 0.0).ms


@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_waiting_for_ranks_is_communication_of_their_axis(rank_pool, axis: str) -> None:
    for ms in rank_pool(2).run(slow_collective, axis):
        assert ms[f"communication_{axis}"] == pytest.approx(DELAY_MS, abs=0.1)
        assert ms["host"] == pytest.approx(DELAY_MS, abs=0.1)
        assert sum(ms.values()) == pytest.approx(2 * DELAY_MS, abs=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_flops_of_the_ops_are_those_of_the_formula(name: str) -> None:
    config: ModelConfig = dataclasses.replace(MODELS[name], sliding_window=0)
    seq, batch = 32, 2
    model = Transformer(config)
    initialize(model, 1)
    tokens = torch.randint(0, 301, (batch * seq,))
    bounds = torch.tensor([0, seq, 2 * seq], dtype=torch.int32)
    rows = frozenset({301, config.padded_vocab_size})
    clock = make_clock(CPU)
    ops = OpClock(clock, Sizes(seq, rows, frozenset({64})))
    with running(ops):
        start = clock.now()
        model.loss(tokens, tokens, cu_seqlens=bounds, max_seqlen=seq).backward()
        end = clock.now()
    times = take_apart(StepStamps(ops.stamps, [], start, end), clock, 0.0)
    flops = flops_per_token(config, seq)
    waterfall = build_waterfall(times, times.total_ms, flops=flops, tokens=64, machine=MACHINE)
    assert waterfall.flops_counted == waterfall.flops_model
    by_part = {key: sum(o.flops for (_, p, _), o in times.ops.items() if p == key) for key in LABELS}
    assert by_part["head"] == flops.terms["head"] * 64, "padding rows are not counted"
    assert by_part["attention"] == 0.5 * flops.terms["attention_full"] * 64
    assert not waterfall.unknown_ops


def test_an_op_without_a_kind_is_named() -> None:
    library = torch.library.Library("waterfall_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x.clone(), "CompositeExplicitAutograd")
    clock = make_clock(CPU)
    ops = OpClock(clock, Sizes(8))
    with running(ops):
        start = clock.now()
        torch.ops.waterfall_test.mystery(torch.ones(3))
        end = clock.now()
    times = take_apart(StepStamps(ops.stamps, [], start, end), clock, 0.0)
    flops = flops_per_token(MODELS["llama"], 8)
    waterfall = build_waterfall(times, times.total_ms, flops=flops, tokens=0, machine=MACHINE)
    assert waterfall.unknown_ops == ("waterfall_test.mystery",)
    assert waterfall.part("other").ms > 0


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm residual", "layer_norm", "swiglu", "rope", "gelu"])
def test_floors_are_those_of_the_contracts(name: str) -> None:
    case = next(c for contract in CONTRACTS.values() for c in contract.cases if c.name == name)
    inputs = case.make(case.doctor, torch.Generator().manual_seed(0)).to(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.leaves]
    ops = OpClock(make_clock(CPU), Sizes(8))
    with running(ops):
        out = case.ours(*leaves, *inputs.fixed)
        outs = list(out) if isinstance(out, tuple) else [out]
        torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs], allow_unused=True)
    moved = sum(s.call.bytes for s in ops.stamps if s.call.name.startswith("megalite."))
    work = case.work(case.doctor, 4)
    # Statistics, weights and tables, which the contracts leave out or count once, are a few percent.
    assert moved == pytest.approx(work.forward_bytes + work.backward_bytes, rel=0.06)


def test_what_the_clock_takes_is_known() -> None:
    """Ops that do nothing: what is left after the clock's own time is what they take without it."""
    clock = make_clock(CPU, process=True)
    x = torch.zeros(1)

    def loop() -> float:
        start = clock.now()
        for _ in range(300):
            x.detach()
        return clock.ms(start, clock.now())

    def left() -> float:
        transit, stamped = transit_ms(clock), []
        for _ in range(5):
            ops = OpClock(clock, Sizes(1))
            with ops:
                start = clock.now()
                loop()
                end = clock.now()
            stamped.append(take_apart(StepStamps(ops.stamps, [], start, end), clock, transit))
        best = min(stamped, key=lambda step: step.total_ms)
        return (best.total_ms - best.clock_ms - min(loop() for _ in range(5))) / best.clock_ms

    # An op takes 1 us, the clock 10, of which a fifth may be wrong; 0.05 were seen. A shared core may run at half its
    # speed from one moment to the next.
    assert statistics.median(left() for _ in range(9)) == pytest.approx(0, abs=0.2)


def test_the_profiler_sorts_the_same_step(open_session) -> None:
    session = open_session()
    watch = Stopwatch(session, dataclasses.replace(STEPS, check=True, rounds=1))
    found = watch.run()
    (times,), (profiled,) = found.clocked, found.profiled
    assert {key for key, ms in profiled.ms.items() if ms} == {key for key, ms in times.ms.items() if ms}
    assert sum(profiled.ms.values()) == pytest.approx(profiled.total_ms)
    mean = mean_profile([[profiled]], times, watch.plan)
    assert mean["gemm"] == profiled.ms["gemm"]


def test_nested_ops_count_once() -> None:
    x = torch.ones(64, 64)

    def step() -> None:
        torch.nn.functional.linear(x, x)

    run, _ = profile_step(step, CPU, Sizes(8))
    profiled = run()
    assert 0 < profiled.ms["gemm"] <= profiled.total_ms
    assert isinstance(profiled, ProfiledStep)


def test_disagreement_is_said() -> None:
    ms = dict.fromkeys((key for key in LABELS if key != "unexplained"), 0.0) | {"gemm": 60.0, "memory": 30.0}
    flops = flops_per_token(MODELS["llama"], 32)
    build = lambda step, profiler: build_waterfall(  # noqa: E731
        StepTimes(90.0, 0.0, ms), step, flops=flops, tokens=1, machine=MACHINE, profiler_ms=profiler
    )
    assert not agreement_problems(build(91.0, {"gemm": 62.0, "memory": 29.0}))
    (problem,) = agreement_problems(build(91.0, {"gemm": 62.0, "memory": 26.0}))
    assert problem.startswith("memory-bound kernels: 30.0 ms, by the profiler 26.0")
    (problem,) = agreement_problems(build(100.0, None))
    assert problem.startswith("10.0% of the step is unexplained")


def test_middle_half() -> None:
    steps = [StepTimes(float(ms), 0.0, {}) for ms in (1, 100, 5, 6, 4, 7, 90, 2)]
    assert sorted(step.total_ms for step in middle_half(steps)) == [4, 5, 6, 7]
    assert len(middle_half(steps[:1])) == 1


def test_sizes_of_a_vocabulary(open_session) -> None:
    sizes = sizes_of(open_session())
    assert sizes.vocab_rows == {301, 384}
    copy = torch.ops.aten.copy_.default
    classify = Classifier(sizes)
    for rows, kind in ((384, "head"), (383, "memory")):
        x = torch.zeros(rows, 32)
        assert classify(copy, (x, x), {}, x).kind == kind


def test_a_gpu_has_no_process_time() -> None:
    with pytest.raises(ValueError, match="clock='process' reads the CPU's time"):
        make_clock(torch.device("cuda"), process=True)
