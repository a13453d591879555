"""layer_norm, alone and with the residual addition, against torch, torch.compile, Liger and apex."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "layer_norm",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
