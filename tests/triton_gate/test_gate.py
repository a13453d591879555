"""Every Triton kernel compiles for the GPUs we name, spills nothing, and is what the committed table says."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter (make test-triton)", allow_module_level=True)

import triton

from tests.triton_gate.gate import TARGETS, Case, broken_promises, cases, compile_case, groups, table

CASES = [(group, case) for group in groups() for case in cases(group)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("group", "case"), CASES, ids=[case.name for _, case in CASES])
def test_kernels_keep_their_promises_and_the_table(group: str, case: Case) -> None:
    rows = [row for target in case.targets for row in compile_case(case, target)]
    assert rows, "the case launched nothing"
    assert not [reason for row in rows for reason in broken_promises(row, case)]
    launched = {row["kernel"] for row in rows}
    assert set(case.tensor_cores) <= launched, f"not launched: {set(case.tensor_cores) - launched}"
    committed = table(group)
    if committed["triton"] == triton.__version__:  # another version's compiler allocates other registers
        expected = [row for row in committed["rows"] if row["case"] == case.name]
        assert rows == expected, f"if the change is meant: python -m tests.triton_gate.gate {group}"


@pytest.mark.parametrize("group", groups())
def test_the_tables_have_these_cases_and_no_others(group: str) -> None:
    assert {row["case"] for row in table(group)["rows"]} == {case.name for case in cases(group)}


def test_the_gate_sees_a_spill_and_a_missing_tensor_core() -> None:
    row = {
        "case": "x",
        "target": "sm_90",
        "kernel": "k",
        "local_bytes": 8,
        "shared_bytes": 0,
        "instructions": {},
    }
    case = Case("x", lambda: None, tensor_cores=("k",))
    assert len(broken_promises(row, case)) == 2
    assert not broken_promises(row | {"local_bytes": 0, "instructions": {"HGMMA": 4}}, case)
    assert set(TARGETS) == set(case.targets)
