"""Calls into the native library `megalite_kernels._C`; imported on first use only."""
