"""relu squared against torch, torch.compile and Liger."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "relu_squared",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
