"""Kernel benchmarks: `python -m benchmarks.kernels` runs all, `python -m benchmarks.kernels.bench_OP` one."""
