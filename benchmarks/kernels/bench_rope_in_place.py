"""rope in place against rotate_half and a copy in torch and torch.compile."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "rope_",
    PEERS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
