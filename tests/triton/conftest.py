"""These tests interpret the Triton kernels on the CPU: `make test-triton` sets TRITON_INTERPRET=1 for them."""

from __future__ import annotations

import importlib.util
import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.helpers.triton_interpreter import correct_bfloat16

    correct_bfloat16()
