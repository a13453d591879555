"""attention (causal, full, window, packed) against torch's scaled_dot_product_attention and flash-attn."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark(
    "attention",
    PEERS,
    more_shapes={"attention causal": {"cpu": [{"B": 1, "S": 4096, "N": 4, "K": 4, "D": 64}]}},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
