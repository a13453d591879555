"""Which instances of each CUDA kernel exist: standard library only, so that a build can read them without torch."""
