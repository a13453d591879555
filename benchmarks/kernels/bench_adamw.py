"""adamw_, with an fp32 master, with its 16-bit remainder and with stochastic rounding, against torch's fused AdamW."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "adamw_",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
