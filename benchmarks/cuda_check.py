"""The CUDA kernels against their contracts: every case whose ops have some, in every dtype, forward and backward.

    PYTHONPATH=.:kernels python -m benchmarks.cuda_check [--ops rms_norm,attention] [--run-only] [--device cuda]

With --run-only nothing is compared: each case runs once at its small shape, which is what `compute-sanitizer` wants.
Exits with 1 if a contract is broken or no CUDA kernel ran. `--device cpu` rehearses in the emulator, with
MEGALITE_CUDA_EMULATE=80 or 90.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from megalite_kernels.backend import recording, use_backend
from megalite_kernels.cases import CASES
from megalite_kernels.cases.base import Case
from megalite_kernels.cases.checking import check_case, results
from megalite_kernels.contract import CONTRACTS
from megalite_kernels.doctor import name_of, split_ops

CUDA_FIRST = ("cuda", "triton", "reference")
"""Back-ends of a check: what has no CUDA kernel, or not for these arguments, is left to others."""
WITHOUT_GPU = ("cuda", "reference")
TORCHS_OWN = "fp8_product"
"""Bears the back-end's name too, and is torch's product."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of a case that is for fp32 too; another is for what it names."""


def cuda_ops(case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """The raw ops that a case runs on CUDA kernels at its small shape; in order, each once."""
    inputs = case.make(case.check, torch.Generator(device).manual_seed(0)).to(dtype)
    with use_backend(*(CUDA_FIRST if device == "cuda" else WITHOUT_GPU)), recording() as record:
        results(case, case.ours, inputs)
    ops = dict.fromkeys(choice.op for choice in record if choice.backend == "cuda")
    return [op for op in ops if op != TORCHS_OWN]


def check(case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """What a case breaks in one dtype, CUDA kernels first."""
    with use_backend(*(CUDA_FIRST if device == "cuda" else WITHOUT_GPU)):
        found = check_case(case, dtype, device, factor=CONTRACTS[case.op].factor)
    return [f"{name}: {one}" for name, one in found.items() if not one.kept]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; 0 if CUDA kernels ran and kept every contract."""
    parser = argparse.ArgumentParser(prog="cuda_check", description="Check the CUDA kernels.")
    parser.add_argument("--ops", default="", help="comma-separated public ops; all by default")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: in the emulator")
    parser.add_argument("--run-only", action="store_true", help="compare nothing")
    arguments = parser.parse_args(argv)
    names = split_ops(arguments.ops)
    if unknown := [name for name in names if name not in CONTRACTS]:
        parser.error(f"op {unknown[0]!r} is not known: use some of {', '.join(CONTRACTS)}")
    ran: set[str] = set()
    broken = checks = 0
    for case in (case for case in CASES.values() if not names or case.op in names):
        for dtype in DTYPES if torch.float32 in case.dtypes else case.dtypes:
            try:
                ops = cuda_ops(case, dtype, arguments.device)
                if not ops:
                    continue
                wrong = [] if arguments.run_only else check(case, dtype, arguments.device)
            except Exception as error:  # one kernel that doesn't compile must not hide the others
                ops, wrong = ["?"], [f"{type(error).__name__}: {error}"]
            ran.update(ops)
            checks += 1
            broken += bool(wrong)
            print(f"{'BROKEN' if wrong else 'ok    '} {case.name} {name_of(dtype)}: {', '.join(ops)}")
            for reason in wrong:
                print(f"       {reason}")
            sys.stdout.flush()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    if not checks:
        print("no CUDA kernel took part: megalite doctor says why")
        return 1
    print(f"{checks} checks of {len(ran)} ops on CUDA kernels, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
