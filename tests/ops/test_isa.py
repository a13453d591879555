"""Every instruction set of the native library, each forced in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.source import ROOT
from tests.ops.catalogue import needs_native

PAIRS = ["cross_entropy", "cross_entropy_local", "head", "attention", "packed_attention", "linear"]
"""Products of pairs of bf16 values: the only kernels that differ where two sets have the same vectors."""
FILES = [*PAIRS, "norms", "activation", "rope", "adamw", "grad_norm", "embedding", "again", "native_math"]
SAME_VECTORS = {"avx512_bf16": "amx", "amx_emulated": "scalar"}
"""Set to the one that runs all other kernels from the same code."""
PROGRAM = """
import sys, pytest, torch
from megalite_kernels import _C
try:
    name = _C.isa_name()
except ValueError as error:
    print(error)
    sys.exit(77)
assert name == sys.argv[1], name
chosen = "(cpu and (ccuracy or extreme or stochastic or master or remainder or again)) or native_math"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *sys.argv[2:]]))
"""


def run(isa: str, *files: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "MEGALITE_ISA": isa,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
    }
    command = [sys.executable, "-c", PROGRAM, isa, *files]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"])
def test_forced_instruction_set_passes_the_catalogue(isa: str) -> None:
    from megalite_kernels import _C

    if isa == _C.isa_name():
        pytest.skip("is what all the other tests run on here")
    proven = SAME_VECTORS.get(isa) in (_C.isa_name(), "scalar")  # by this file or by all the others
    result = run(isa, *(f"tests/ops/test_{name}.py" for name in (PAIRS if proven else FILES)))
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout[-3000:]


@needs_native
def test_an_unknown_name_is_refused() -> None:
    result = run("sse9")
    assert result.returncode == 77
    assert (
        "MEGALITE_ISA=sse9 is not known: use scalar, avx2, avx512, avx512_bf16, amx or amx_emulated"
        in result.stdout
    )
