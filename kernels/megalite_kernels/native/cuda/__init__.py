"""CUDA kernels of csrc/cuda: which there are, how they are compiled, and how they are launched."""
