"""rope, alone and with the norms of the heads, against rotate_half in torch and torch.compile, and Liger."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "rope",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
