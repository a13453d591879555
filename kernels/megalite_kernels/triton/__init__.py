"""Triton kernels and their launchers; imported on first use by `backend.py`, never before."""
