"""Rotation and attention of one packed projection against rotate_half and torch's scaled_dot_product_attention."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main
from benchmarks.kernels.peers import PEERS

BENCHMARK = Benchmark("packed_attention", PEERS)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
