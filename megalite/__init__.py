"""megalite: a Megatron-style core for pre-training language models on next-token prediction."""

from __future__ import annotations

__version__ = "0.1.0"
