"""Every CUDA kernel compiles for the GPUs we name, spills nothing, and is what the committed table says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from megalite_kernels.native.cuda import nvrtc, sources
from megalite_kernels.native.cuda.kernel import instance
from tests.cuda_gate.gate import (
    SHARED_LIMIT,
    Case,
    broken_promises,
    cases,
    compile_case,
    compiler,
    count,
    groups,
    missing_tools,
    table,
    usage_with_nvrtc,
)

if missing_tools():
    pytest.skip(missing_tools(), allow_module_level=True)

CASES = [(group, case) for group in groups() for case in cases(group)]
FIRST_OF_SOURCE = list({case.kernel.source: case for _, case in reversed(CASES)}.values())


def same_compiler(group: str) -> bool:
    """Whether the table is of the nvcc that is here: another one's ptxas allocates other registers."""
    nvcc = compiler()
    return nvcc is not None and table(group)["nvcc"] == ".".join(map(str, nvcc.version))


def _marked(group: str, case: Case) -> pytest.param:  # type: ignore[valid-type]
    """fp16 differs from bf16 in a few conversions: `make test-cuda-all` looks at it too."""
    return pytest.param(group, case, id=case.name, marks=[pytest.mark.slow] if "fp16" in case.name else [])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("group", "case"), [_marked(*pair) for pair in CASES])
def test_kernels_keep_their_promises_and_the_table(group: str, case: Case) -> None:
    rows = [compile_case(case, target) for target in case.compiled_for()]
    assert rows
    assert not [reason for row in rows for reason in broken_promises(row, case)]
    if same_compiler(group):
        expected = [row for row in table(group)["rows"] if row["case"] == case.name]
        assert rows == expected, f"if the change is meant: python -m tests.cuda_gate.gate {group}"


@pytest.mark.parametrize("group", groups())
def test_the_tables_have_these_cases_and_no_others(group: str) -> None:
    names = [case.name for case in cases(group)]
    assert len(set(names)) == len(names), "two cases share a name"
    assert {row["case"] for row in table(group)["rows"]} == set(names)


def test_every_shipped_source_has_a_case() -> None:
    assert {kernel.source for kernel in sources.shipped()} <= {case.kernel.source for _, case in CASES}


@pytest.mark.skipif(nvrtc.find() is None, reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("case", FIRST_OF_SOURCE, ids=[case.kernel.source for case in FIRST_OF_SOURCE])
def test_nvrtc_compiles_every_source_to_about_as_many_registers(case: Case) -> None:
    """Without a toolkit's header, and as nvcc of the same version does: int64_t is another type there, and that alone
    moves a kernel of 250 registers by a few."""
    library, nvcc, target = nvrtc.find(), compiler(), case.compiled_for()[-1]
    assert library is not None
    assert nvcc is not None
    registers, stack = usage_with_nvrtc(case.kernel, target, library)
    assert stack == 0
    if library.version == nvcc.version[:2]:
        assert abs(registers - compile_case(case, target)["registers"]) <= 8


# --- the gate itself ------------------------------------------------------------------------------------------------
SPILLS = """
#if defined(KERNEL_spills)
extern "C" __global__ void __launch_bounds__(THREADS, 2) spills(float* x) {
  float kept[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) kept[i] = x[i * 37];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) kept[i] = kept[i] * kept[(i + 1) % 200] + kept[(i * 7) % 200];
#pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 37] = kept[i];
}
#endif
#if defined(KERNEL_copies)
extern "C" __global__ void __launch_bounds__(THREADS) copies(const float4* x, float4* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
#endif
"""


def test_the_gate_sees_spills_and_instructions(tmp_path, monkeypatch) -> None:
    (tmp_path / "spills.cuh").write_text(SPILLS)
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    case = Case(
        "spills", instance("spills.cuh", "spills", threads=512), required=("HMMA",), targets=("sm_80",)
    )
    copies = Case("copies", instance("spills.cuh", "copies", threads=128), targets=("sm_90a",))
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.map(lambda one: compile_case(one, one.targets[0]), (case, copies))
    assert bad["spill_bytes"] > 0
    assert len(broken_promises(bad, case)) == 2
    assert not broken_promises(good, copies)
    assert good["instructions"]["LDG.E.128"] == good["instructions"]["STG.E.128"] == 1


def test_the_gate_sees_what_a_multiprocessor_cannot_hold() -> None:
    kernel = instance("x.cuh", "x", threads=1024)
    row = {
        "case": "x", "target": "sm_80", "threads": 1024, "registers": 65, "stack_bytes": 0, "spill_bytes": 0,
        "shared_bytes": SHARED_LIMIT["sm_80"] + 1, "instructions": {}, "warnings": ["ptxas warning: slow"],
    }  # fmt: skip
    assert broken_promises(row, Case("x", kernel)) == [
        "x sm_80: ptxas warning: slow",
        "x sm_80: 166913 bytes of shared memory, 166912 is the limit",
        "x sm_80: a block needs 73728 registers, a multiprocessor has 65536",
    ]


def test_names_are_counted_whole() -> None:
    text = " HMMA.16816.F32 R1;\n @P0 LDG.E.128 R2;\n LDGSTS.E R3;\n LDG.E R4;\n"
    assert count(text, ("HMMA", "LDG", "LDG.E.128", "LDGSTS", "STG")) == {
        "HMMA": 1,
        "LDG": 2,
        "LDG.E.128": 1,
        "LDGSTS": 1,
    }


def test_a_case_is_compiled_for_what_its_kernel_is_shipped_for() -> None:
    assert Case("x", instance("x.cuh", "x", threads=32)).compiled_for() == ("sm_80", "sm_90a", "sm_100a")
    hopper = instance("x.cuh", "x", threads=32, target="sm_90a")
    assert Case("x", hopper).compiled_for() == ("sm_90a",)
    by_target = Case("x", hopper, required=("A",), required_by_target={"sm_90a": ("B",)})
    row = {
        "case": "x", "target": "sm_90a", "threads": 32, "registers": 8, "stack_bytes": 0, "spill_bytes": 0,
        "shared_bytes": 0, "instructions": {"A": 1},
    }  # fmt: skip
    assert broken_promises(row, by_target) == ["x sm_90a: no B instruction"]
