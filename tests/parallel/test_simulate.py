"""The schedule simulator against closed forms, and against tables that cannot run."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import ParallelConfig
from megalite.errors import UserError
from megalite.parallel.action_table import (
    ENGINE_NAMES,
    Op,
    ScheduleError,
    Table,
    check_complete,
    format_table,
    parse_table,
    schedule_table,
)
from megalite.parallel.simulate import DeadlockError, StageBytes, StageTimes, Timeline, needs, simulate

ONE_STAGE = ("gpipe", "1f1b")
LOOPED = ("looped_bfs", "interleaved", "interleaved_zero_bubble")
V = ("zbv", "dualpipev")


def run(schedule: str, pp: int, micro_batches: int, stages: int = 0, **times: float) -> Timeline:
    stages = stages or (1 if schedule in ONE_STAGE else 2)
    table = schedule_table(schedule, pp, stages, micro_batches)  # type: ignore[arg-type]
    return simulate(table, StageTimes.even(pp * stages, **times))


def idle_over_busy(timeline: Timeline) -> list[float]:
    return [timeline.makespan / rank.busy - 1 for rank in timeline.ranks]


@pytest.mark.parametrize("schedule", ONE_STAGE)
@pytest.mark.parametrize(("pp", "m"), [(2, 2), (2, 7), (4, 8), (8, 64)])
def test_bubble_of_gpipe_and_1f1b(schedule, pp, m):
    """(p - 1) / (m + p - 1), however the time of a micro-batch divides into passes (GPipe, arXiv 1811.06965)."""
    for times in ({}, {"forward": 1.0, "input_": 2.5, "weight": 0.5}):
        timeline = run(schedule, pp, m, **times)
        assert timeline.bubble == pytest.approx((pp - 1) / (m + pp - 1), rel=1e-12)
    assert timeline.peak_activations == (
        (m,) * pp if schedule == "gpipe" else tuple(min(m, pp - rank) for rank in range(pp))
    )


@pytest.mark.parametrize("schedule", ["looped_bfs", "interleaved"])
@pytest.mark.parametrize(("pp", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 8, 3), (4, 16, 4)])
def test_bubble_of_looped_schedules(schedule, pp, m, v):
    """Idle time (p - 1) / (v · m) of the busy time (Megatron-LM, arXiv 2104.04473)."""
    timeline = run(schedule, pp, m, v)
    assert idle_over_busy(timeline) == pytest.approx([(pp - 1) / (v * m)] * pp, rel=1e-12)
    if schedule == "interleaved":  # as many forward passes ahead as its warm-up has
        ahead = [min(v * m, 2 * (pp - 1 - rank) + (v - 1) * pp + 1) for rank in range(pp)]
        assert list(timeline.peak_activations) == ahead
    else:
        assert timeline.peak_activations == (v * m,) * pp


@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 64), (8, 32)])
def test_zbv_has_no_bubble_but_the_ranks_start_one_after_the_other(pp, m):
    """With F = I = W nothing is idle between a rank's first and last action; memory is that of 1F1B's first rank
    on all ranks, 2p halves of a rank's layers (arXiv 2401.10241, section 6)."""
    timeline = run("zbv", pp, m)
    for rank in timeline.ranks:
        assert rank.spans[-1].end - rank.spans[0].start == rank.busy
    assert timeline.makespan == 6 * m + pp - 1
    assert timeline.peak_activations == (2 * pp,) * pp
    assert timeline.bubble < run("interleaved", pp, m).bubble < run("1f1b", pp, m).bubble


def test_bubble_vanishes_with_many_micro_batches():
    bubbles = [run("zbv", 4, m).bubble for m in (8, 32, 128, 512)]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[-1] < 0.001


def test_transfers_that_nothing_hides_are_counted():
    """Two ranks, one micro-batch: the way there and the way back are all exposed."""
    timeline = simulate(parse_table(["0F0 0B0", "1F0 1B0"]), StageTimes.even(2, send=0.25))
    assert timeline.makespan == 1 + 0.25 + 1 + 2 + 0.25 + 2
    assert [rank.exposed for rank in timeline.ranks] == [0.25, 0.25]
    assert timeline.exposed == pytest.approx(0.5 / (2 * 6.5))
    # With work in between the transfer to rank 1 costs nothing after the first.
    busy = simulate(
        parse_table(["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]), StageTimes.even(2, send=0.25)
    )
    assert busy.ranks[1].exposed == 0.25
    # Two stages on one rank hand over without a transfer.
    assert simulate(parse_table(["0F0 1F0 1B0 0B0"]), StageTimes.even(2, send=9.0)).makespan == 6


def test_a_pair_of_passes_sends_its_results_at_its_end():
    rows = ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]
    apart = simulate(parse_table(rows), StageTimes.even(2))
    pair = simulate(parse_table([rows[0], "1F0 (1B0;1F1) 1B1"]), StageTimes.even(2))
    starts = [next(s.start for s in t.ranks[0].spans if s.op == Op(0, "B", 0)) for t in (apart, pair)]
    assert starts == [4, 5]


def test_uneven_stages_wait_for_the_slowest():
    times = StageTimes((1.0, 3.0), (1.0, 3.0), (1.0, 3.0))
    timeline = simulate(schedule_table("1f1b", 2, 1, 16), times)
    assert timeline.makespan == 16 * 9 + 3
    assert timeline.bubble_of(1) == pytest.approx(3 / 147)
    assert timeline.bubble_of(0) == pytest.approx(1 - 48 / 147)


def test_whole_backward_passes_may_have_their_own_time():
    times = StageTimes((1.0,), (1.0,), (1.0,), backward=(1.5,))
    assert simulate(parse_table(["0F0 0B0 0F1 0I1 0W1"]), times).makespan == 1 + 1.5 + 1 + 1 + 1
    with pytest.raises(ValueError, match="times of 2 stages for a table of 1"):
        simulate(parse_table(["0F0 0B0"]), StageTimes((1.0,), (1.0,), (1.0,), backward=(1.0, 1.0)))


def test_bytes_follow_the_stages():
    """Stage 1 keeps 5 bytes until its weights' gradients, and still 2 between the two."""
    table = parse_table(["0F0 1F0 1I0 0B0 1W0"])
    timeline = simulate(table, StageTimes.even(2), StageBytes((10.0, 5.0), (10.0, 2.0)))
    assert timeline.ranks[0].memory == [(0, 0), (0, 10), (1, 15), (3, 12), (5, 2), (6, 0)]
    assert timeline.peak_bytes == (15.0,)
    assert timeline.peak_activations == (2,)


def test_putting_off_weight_gradients_costs_memory():
    early = parse_table(["0F0 0I0 0W0 0F1 0I1 0W1 0F2 0I2 0W2"])
    late = parse_table(["0F0 0I0 0F1 0I1 0F2 0I2 0W0 0W1 0W2"])
    assert simulate(early, StageTimes.even(1)).peak_activations == (1,)
    assert simulate(late, StageTimes.even(1)).peak_activations == (3,)


def test_a_deadlock_names_each_ranks_first_action_that_never_runs():
    """Rank 0 wants the gradient of micro-batch 1 first, but sends its input only after that."""
    table = parse_table(["0F0 0B1 0F1 0B0", "1F0 1B0 1F1 1B1"])
    with pytest.raises(DeadlockError) as caught:
        simulate(table, StageTimes.even(2))
    assert caught.value.blocked == {
        0: (Op(0, "B", 1), Op(0, "F", 1)),
        1: (Op(1, "F", 1), Op(0, "F", 1)),
    }
    assert str(caught.value) == (
        "deadlock: rank 0 can never run 0B1, which waits for 0F1; rank 1 can never run 1F1, which waits for 0F1"
    )


def test_a_pair_that_needs_its_own_result_back_is_a_deadlock():
    """The forward pass of a pair leaves only after its backward pass, which waits for what the forward pass starts."""
    rows = ["0F0 0B0", "1F0 1B0"]
    simulate(parse_table(rows), StageTimes.even(2))
    with pytest.raises(DeadlockError, match="rank 0 can never run 0B0, which waits for 1B0"):
        simulate(parse_table(["(0F0;0B0)", rows[1]]), StageTimes.even(2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0F0 0B0", "1F0"], "missing actions: 1B0$"),
        (["0F0 0I0", "1F0 1B0"], "missing actions: 0W0$"),
        (["0F0 0B0 0B1", "1F0 1B0"], "missing actions: 0F1, 1F1, 1B1$"),
        (["0F0 0W0", "1F0 1B0"], "missing actions: 0I0$"),
        (["0F0 0B0 0F0", "1F0 1B0"], "0F0 is there twice: on rank 0 and on rank 0"),
        (["0F0 0B0 0W0", "1F0 1B0"], "0B0 computes what 0I0 or 0W0 computes again"),
        (["0F0 1B0", "1F0 0B0"], "stage 1 is on rank 0, but 1F0 on rank 1"),
        (["", ""], "the table is empty"),
        (["0F"], "'0F' is no action"),
        (["(0F0;0X0)"], "is no action"),
    ],
)
def test_tables_that_do_not_compute_every_gradient_once(rows, message):
    with pytest.raises(ScheduleError, match=message):
        simulate(parse_table(rows), StageTimes.even(2))


def test_times_of_another_number_of_stages():
    with pytest.raises(ValueError, match="times of 3 stages for a table of 2"):
        simulate(schedule_table("gpipe", 2, 1, 2), StageTimes.even(3))


def allowed(schedule: str, pp: int, stages: int, micro_batches: int) -> bool:
    try:
        ParallelConfig(pp=pp, pp_schedule=schedule, pp_stages=stages).validate_microbatches(micro_batches)  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def check_order(table: Table, timeline: Timeline, send: Fraction) -> None:
    """Rows in order, no two actions of a rank at once, and no action before its inputs have arrived."""
    rank_of = timeline.facts.rank_of
    ends = {span.op: span.end for rank in timeline.ranks for span in rank.spans}
    for row, rank in zip(table, timeline.ranks, strict=True):
        assert [span.op for span in rank.spans] == [op for step in row for op in step]
        for before, after in zip(rank.spans, rank.spans[1:], strict=False):
            assert before.end <= after.start
        for span in rank.spans:
            for need in needs(span.op, timeline.facts):
                travel = 0 if rank_of[need.stage] == rank_of[span.op.stage] else send
                assert ends[need] + travel <= span.start


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(sorted(ENGINE_NAMES)),
    pp=st.integers(2, 6),
    stages=st.integers(2, 4),
    m=st.integers(1, 20),
    data=st.data(),
)
def test_every_schedule_that_the_config_allows_runs(schedule, pp, stages, m, data):
    stages = 1 if schedule in ONE_STAGE else 2 if schedule in V else stages
    if not allowed(schedule, pp, stages, m):
        return
    table = schedule_table(schedule, pp, stages, m)
    count = pp * stages
    # Exact fractions: sums of times then do not depend on their order.
    seconds = st.builds(Fraction, st.integers(1, 9), st.just(4))
    forward, input_, weight = (tuple(data.draw(seconds) for _ in range(count)) for _ in range(3))
    send = data.draw(seconds)
    timeline = simulate(table, StageTimes(forward, input_, weight, send))
    check_order(table, timeline, send)
    assert parse_table(format_table(table)) == table
    assert timeline.facts[:2] == (count, m)
    whole = [forward[s] + input_[s] + weight[s] for s in range(count)]
    for rank, line in enumerate(timeline.ranks):
        assert line.busy == m * sum(whole[s] for s in range(count) if timeline.facts.rank_of[s] == rank)
        assert line.kept == 0
        assert line.memory[-1][1] == 0
        assert line.exposed <= timeline.makespan - line.busy
        assert 1 <= line.peak_activations <= m * stages
    path = sum(whole)  # of one micro-batch through all stages, weights of the others left out
    assert timeline.makespan >= max(*(line.busy for line in timeline.ranks), path - sum(weight))


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(sorted(ENGINE_NAMES)),
    pp=st.integers(2, 4),
    rounds=st.integers(2, 3),
    data=st.data(),
)
def test_a_table_with_two_actions_of_a_rank_exchanged_runs_in_order_or_is_refused(schedule, pp, rounds, data):
    """Whatever the exchange, the simulator either respects every dependency or names a real deadlock."""
    stages = 1 if schedule in ONE_STAGE else 2
    table = [list(row) for row in schedule_table(schedule, pp, stages, 2 * pp * rounds)]
    row = table[data.draw(st.integers(0, pp - 1))]
    a, b = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[a], row[b] = row[b], row[a]
    changed = tuple(tuple(each) for each in table)
    blocked = who_is_blocked(changed, pp * stages)
    if not blocked:
        check_order(changed, simulate(changed, StageTimes.even(pp * stages)), Fraction(0))
    facts = check_complete(changed)
    for op, missing in blocked.values():
        assert missing in needs(op, facts)
    # Whoever is waited for is blocked too: nobody could go on.
    assert {facts.rank_of[missing.stage] for _, missing in blocked.values()} <= set(blocked)


def who_is_blocked(table: Table, num_stages: int) -> dict[int, tuple[Op, Op]]:
    """Nobody, where the table runs."""
    try:
        simulate(table, StageTimes.even(num_stages))
    except DeadlockError as error:
        return error.blocked
    return {}
