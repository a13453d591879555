"""grad_norm against torch.linalg.vector_norm."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "grad_norm",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
