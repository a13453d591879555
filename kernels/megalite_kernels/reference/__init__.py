"""Plain torch definitions of every op: they say what is correct and run on any device.

Each computes in float32, or in the input's own dtype if that is wider, and casts once at the end, so the
same code called with float64 tensors is the truth that every other backend is measured against.
"""
