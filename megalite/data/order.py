"""Which tokens sample n holds, as a pure function of (seed, n): no index files, no state, exact integers.

Two parts. *Within* a dataset, sample n of epoch e is a keyed permutation (a Feistel network) of the
fixed-length pieces of its token stream. *Between* datasets, a Weyl sequence (multiples of the golden ratio
modulo 1, here exactly modulo 2⁶⁴) picks the dataset of sample n, and a floor sum counts in O(log) how often
it was picked before. Nothing here depends on the length of the run, the batch or the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from megalite.errors import UserError

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
"""⌊2⁶⁴/φ⌋, odd: its multiples visit every 64-bit value once, spread as evenly as any sequence does."""
MAX_DOMAIN = 2**62
EPOCHS_KEPT = 4
ROUNDS = 8
"""Luby and Rackoff need 4 for security against a bounded adversary; small halves mix more slowly."""


def mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers that flips each output bit half the time.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (variant 13).
    """
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """A 64-bit key from several integers; order matters."""
    state = 0
    for part in parts:
        state = mix(state + GOLDEN + mix(part))
    return state


@dataclass(frozen=True, slots=True)
class Permutation:
    """A keyed bijection of [0, size), evaluated at one point at a time.

    A Feistel network over ⌈log₂ size⌉ bits (halves may differ by one bit; they are rewritten in turn, which
    is a bijection whatever the round function), repeated until the value falls below `size` (cycle walking:
    fewer than 2 passes on average).

    Args:
        size: number of elements, 1 to 2⁶².
        key: 64-bit key.
    """

    size: int
    key: int
    _round_keys: tuple[int, ...] = field(init=False, repr=False)
    _low_bits: int = field(init=False, repr=False)
    _high_bits: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_DOMAIN:
            raise UserError(f"a sample order over size={self.size} elements needs 1 <= size <= 2**62")
        bits = (self.size - 1).bit_length()
        object.__setattr__(self, "_round_keys", tuple(key(self.key, r) for r in range(ROUNDS)))
        object.__setattr__(self, "_high_bits", bits // 2)
        object.__setattr__(self, "_low_bits", bits - bits // 2)

    def __call__(self, index: int) -> int:
        """Image of `index`; O(1) expected."""
        if not 0 <= index < self.size:
            raise ValueError(f"index={index} must be in [0, {self.size})")
        value = self._network(index)
        while value >= self.size:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        low_mask, high_mask = (1 << self._low_bits) - 1, (1 << self._high_bits) - 1
        low, high = value & low_mask, value >> self._low_bits
        for number, round_key in enumerate(self._round_keys):
            # The top bits of the mixed word are its best ones; a shift of 2 keeps up to 62 of them.
            if number % 2 == 0:
                low ^= (mix(high ^ round_key) >> 2) & low_mask
            else:
                high ^= (mix(low ^ round_key) >> 2) & high_mask
        return high << self._low_bits | low


def floor_sum(n: int, modulus: int, a: int, b: int) -> int:
    """Σ_{k=0}^{n-1} ⌊(a·k + b) / modulus⌋ for n, a, b ≥ 0, in O(log modulus) exact steps.

    Source: the Euclid-like recursion of Graham, Knuth, Patashnik, "Concrete Mathematics", §3.5.
    """
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // modulus) + n * (b // modulus)
        a, b = a % modulus, b % modulus
        # Lattice points under the line, counted along the other axis.
        n, b = divmod(a * n + b, modulus)
        a, modulus = modulus, a
    return total


@dataclass(frozen=True, slots=True)
class Blend:
    """Closed-form interleaving of several datasets by weight.

    Sample n belongs to the dataset whose interval of [0, 2⁶⁴) holds (n·GOLDEN + start) mod 2⁶⁴; intervals are
    proportional to the weights. After n samples each dataset has n·share ± O(log n) of them, at every n.

    Args:
        weights: relative shares, each > 0.
        seed: shifts the sequence.
    """

    weights: tuple[float, ...]
    seed: int
    _edges: tuple[int, ...] = field(init=False, repr=False)
    _start: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.weights or any(not 0 < weight < float("inf") for weight in self.weights):
            raise UserError(
                f"data.datasets weights {list(self.weights)} must all be greater than 0 and finite"
            )
        object.__setattr__(self, "_edges", _edges(self.weights))
        object.__setattr__(self, "_start", key(self.seed, 0xB1E4D))

    def __call__(self, n: int) -> tuple[int, int]:
        """(dataset, index within the dataset) of sample n; O(log) exact."""
        value = (n * GOLDEN + self._start) & MASK
        dataset = next(d for d in range(len(self.weights)) if value < self._edges[d + 1])
        return dataset, self.count(dataset, n)

    def count(self, dataset: int, n: int) -> int:
        """How many of the samples 0 … n-1 belong to `dataset`."""
        if len(self.weights) == 1:
            return n
        return self._below(self._edges[dataset + 1], n) - self._below(self._edges[dataset], n)

    def _below(self, edge: int, n: int) -> int:
        """How many of the first n sequence values are less than `edge`.

        x mod m < c is ⌊x/m⌋ - ⌊(x + m - c)/m⌋ + 1 for 0 ≤ c ≤ m.
        """
        modulus = MASK + 1
        crossed = floor_sum(n, modulus, GOLDEN, self._start)
        return crossed - floor_sum(n, modulus, GOLDEN, self._start + modulus - edge) + n


def _edges(weights: Sequence[float]) -> tuple[int, ...]:
    """Cumulative weights scaled to 2⁶⁴, exactly rounded: 0 = edge 0 ≤ … ≤ last edge = 2⁶⁴."""
    exact = [Fraction(weight) for weight in weights]
    total, running = sum(exact), Fraction(0)
    edges = [0]
    for weight in exact:
        running += weight
        edges.append(int(running * 2**64 / total))
    return tuple(edges)


@dataclass(frozen=True, slots=True)
class StreamOrder:
    """Where sample n of one dataset starts in its circular token stream.

    Epoch e = n // samples_per_epoch visits every piece of `seq_length` tokens once, in an order keyed by
    (seed, e). Each epoch cuts the circle at another place, so that the tokens left over at its end, and the
    places where documents are cut, differ from epoch to epoch.

    Args:
        tokens: length of the stream, at least seq_length.
        seq_length: tokens per sample (S).
        seed: key of the order.
    """

    tokens: int
    seq_length: int
    seed: int
    _epochs: dict[int, tuple[Permutation, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """(permutation, shift) of the epochs last asked for: deriving their keys costs more than using them."""

    def __post_init__(self) -> None:
        if self.tokens < self.seq_length:
            raise UserError(
                f"a dataset of {self.tokens} tokens cannot fill one sample of train.seq_length="
                f"{self.seq_length}: prepare more text or shorten the samples"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which the tokens repeat (M)."""
        return self.tokens // self.seq_length

    def start(self, n: int) -> int:
        """Stream position of the first token of sample n ≥ 0; the sample runs on modulo `tokens`."""
        epoch, index = divmod(n, self.samples_per_epoch)
        permutation, shift = self._epochs.get(epoch) or self._derive(epoch)
        return (permutation(index) * self.seq_length + shift) % self.tokens

    def _derive(self, epoch: int) -> tuple[Permutation, int]:
        if len(self._epochs) >= EPOCHS_KEPT:
            self._epochs.clear()
        permutation = Permutation(self.samples_per_epoch, key(self.seed, epoch, 1))
        derived = permutation, key(self.seed, epoch, 2) % self.tokens
        self._epochs[epoch] = derived
        return derived
