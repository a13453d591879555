"""linear with an fp32 accumulator for the weight's gradient, against making the gradient and adding it."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "linear",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
