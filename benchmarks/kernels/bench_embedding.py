"""embedding, with and without an fp32 accumulator for its gradient, against torch."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "embedding",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
