"""fp8_layer_norm against the norm alone in plain torch, which quantises nothing."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main

BENCHMARK = Benchmark("fp8_layer_norm", ())

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
