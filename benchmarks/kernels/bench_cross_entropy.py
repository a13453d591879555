"""cross_entropy of logits against torch, torch.compile, Liger and quack."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "cross_entropy",
    PEERS,
    more_shapes={"cross_entropy": {"cuda": [{"T": 4096, "V": 262144}]}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
