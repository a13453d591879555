"""Other trainers at the same shape, weights, batches and optimizer: what our throughput is compared with."""

from __future__ import annotations
