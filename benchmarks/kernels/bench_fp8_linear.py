"""fp8_linear against the same quantisation and products in plain torch."""

from __future__ import annotations

import sys

from benchmarks.kernels.common import Benchmark, main

BENCHMARK = Benchmark("fp8_linear", ())

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
