"""linear_cross_entropy against linear + cross_entropy in torch and torch.compile, Liger, and cut-cross-entropy."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "linear_cross_entropy",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
