"""Text to tokens to batches.

`prepare` turns files into a dataset folder (`indexed`: the Megatron ``.bin/.idx`` pair); `order` says which
tokens sample n holds, as a pure function; `dataset` reads them; `loader` makes micro-batches of them;
`validation` cuts held-out documents into scored windows. Importing this package is free: torch is imported
only by `loader` and `validation`, so that the preparing processes stay small.
"""
