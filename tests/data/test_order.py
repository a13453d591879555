"""The sample order: bijections, exact counts against brute force, far numbers, no dependence on length."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.order import GOLDEN, Blend, Permutation, StreamOrder, floor_sum, key, mix
from megalite.errors import UserError

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, seed: int):
    permutation = Permutation(size, seed)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 2**16, 2**16 + 1, 10**12, 2**62 - 1, 2**62])
def test_permutation_of_any_size(size: int):
    permutation = Permutation(size, 7)
    points = {0, size - 1, size // 2, size // 3}
    images = {permutation(point) for point in points}
    assert len(images) == len(points)
    assert all(0 <= image < size for image in images)


def test_permutation_is_uniform():
    """Each of the 24 orders of 4 elements comes up about 250 times in 6,000 keys (χ², p ≈ 1e-5)."""
    counts = Counter(tuple(Permutation(4, key(seed))(i) for i in range(4)) for seed in range(6_000))
    assert len(counts) == 24
    assert sum((count - 250) ** 2 / 250 for count in counts.values()) < 65


def test_neighbours_are_scattered():
    """Consecutive indices land far apart: the mean distance of random pairs is a third of the size."""
    size = 10**9
    permutation = Permutation(size, 3)
    images = [permutation(i) for i in range(2000)]
    distance = sum(abs(a - b) for a, b in itertools.pairwise(images)) / len(images) / size
    assert abs(distance - 1 / 3) < 0.03


def test_permutation_refuses_what_it_cannot_do():
    for size in (0, 2**62 + 1):
        with pytest.raises(UserError, match="needs 1 <= size <= 2"):
            Permutation(size, 1)
    with pytest.raises(ValueError, match=r"index=5 must be in \[0, 5\)"):
        Permutation(5, 1)(5)


def test_mix_is_splitmix64():
    """The generator's first outputs for seed 1234567, from its reference implementation."""
    outputs = [mix((1234567 + (i + 1) * GOLDEN) & (2**64 - 1)) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 200), modulus=st.integers(1, 10**6), a=st.integers(0, 10**7), b=st.integers(0, 10**7))
def test_floor_sum_against_brute_force(n: int, modulus: int, a: int, b: int):
    assert floor_sum(n, modulus, a, b) == sum((a * k + b) // modulus for k in range(n))


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**63))
def test_blend_against_brute_force(weights: list[float], seed: int):
    blend = Blend(tuple(weights), seed)
    used = [0] * len(weights)
    for n in range(120):
        dataset, index = blend(n)
        assert index == used[dataset]
        assert [blend.count(d, n) for d in range(len(weights))] == used
        used[dataset] += 1


def test_counting_below_an_edge_that_is_hit_exactly():
    """An interval holds its lower edge and not its upper one."""
    blend = Blend((1.0, 1.0), 3)
    values = [(k * GOLDEN + blend._start) % 2**64 for k in range(40)]
    for edge in (*values, 0, 2**64):
        assert blend._below(edge, 40) == sum(value < edge for value in values)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**63), n=st.integers(1, 10**13))
def test_shares_follow_the_weights(weights: list[float], seed: int, n: int):
    """The golden ratio's discrepancy: less than 2 + log₂ n off, at every length."""
    blend = Blend(tuple(weights), seed)
    counts = [blend.count(d, n) for d in range(len(weights))]
    assert sum(counts) == n
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - n * weight / sum(weights)) < 2 + math.log2(n)


def test_blend_at_a_trillion_is_exact_and_quick():
    blend = Blend((0.7, 0.2, 0.1), 42)
    n = 10**12
    before = [blend.count(d, n) for d in range(3)]
    for m in range(n, n + 200):
        dataset, index = blend(m)
        assert index == before[dataset]
        before[dataset] += 1
    began = time.process_time()
    for m in range(n, n + 200):
        blend(m)
    assert (time.process_time() - began) / 200 < 2e-3, "logarithmic: some tens of microseconds, not a walk"


def test_blend_refuses_bad_weights():
    for weights in ((), (1.0, 0.0), (1.0, -1.0), (float("inf"),), (float("nan"),)):
        with pytest.raises(UserError, match=r"weights .* must all be greater than 0 and finite"):
            Blend(weights, 1)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(5, 300), seq_length=st.integers(1, 5), seed=st.integers(0, 2**63))
def test_an_epoch_reads_disjoint_pieces(tokens: int, seq_length: int, seed: int):
    order = StreamOrder(tokens, seq_length, seed)
    for epoch in range(3):
        first = epoch * order.samples_per_epoch
        starts = [order.start(first + i) for i in range(order.samples_per_epoch)]
        read = [(start + i) % tokens for start in starts for i in range(seq_length)]
        assert len(set(read)) == len(read), "no token twice in an epoch"
        assert len(read) > tokens - seq_length, "and all but a remainder of less than one sample"


def test_epochs_differ_in_order_and_in_cuts():
    order = StreamOrder(10_007, 16, 5)
    size = order.samples_per_epoch
    first, second = ([order.start(epoch * size + i) for i in range(size)] for epoch in range(2))
    assert first != second
    assert {start % 16 for start in first[:50]} != {start % 16 for start in second[:50]}


def test_order_is_prefix_stable_and_memoryless():
    """Sample n is the same whatever was asked before, and for any length of run."""
    forward = StreamOrder(10_007, 16, 5)
    starts = [forward.start(n) for n in range(5000)]
    backward = StreamOrder(10_007, 16, 5)
    assert [backward.start(n) for n in reversed(range(5000))] == starts[::-1]
    assert StreamOrder(10_007, 16, 5).start(10**12) == forward.start(10**12)


def test_too_short_a_dataset():
    with pytest.raises(UserError, match=r"dataset of 9 tokens cannot fill one sample of train.seq_length=10"):
        StreamOrder(9, 10, 1)
