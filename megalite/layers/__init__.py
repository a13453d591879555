"""The parts of a transformer. Each takes plain sizes, computes through `megalite_kernels`, and declares the
pieces its parameters hold (`megalite.parallel.pieces`).

Shape letters: B batch, S sequence, T = B*S, H hidden, N query heads, K key/value heads, D head dim, F ffn,
V vocabulary. "..." stands for [B, S] or, packed, [T].
"""
