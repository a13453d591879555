"""Every function of ptx.cuh assembles for its architectures, becomes its instruction, and exists for no other.

This is what stands in for the emulator where it says nothing: emulation replaces ptx.cuh, and tests no line of it. What
the strings compute is for a GPU to say.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megalite_kernels.native.cuda import sources
from tests.cuda_gate.gate import compiler, missing_tools, sass

if missing_tools():
    pytest.skip(missing_tools(), allow_module_level=True)

AMPERE, HOPPER, WGMMA = "sm_80", "sm_90", "sm_90a"
TARGETS = {"sm_80": (AMPERE,), "sm_90a": (AMPERE, HOPPER, WGMMA), "sm_100a": (AMPERE, HOPPER)}
"""Of each compiled architecture, the families that it has."""


@dataclass(frozen=True, slots=True)
class Call:
    """One function in use."""

    code: str
    """Statements; `shared`, `global`, `barrier`, `map`, `words` and `sums` are there to be used."""
    instruction: str = ""
    """A pattern that the SASS must have; empty where none is promised."""
    family: str = AMPERE
    threads: int = 128


def store(value: str) -> str:
    return f"global[threadIdx.x] = {value};"


def each(array: str, size: int) -> str:
    return "".join(f"words[{i} * 128 + threadIdx.x] = {array}[{i}];" for i in range(size))


A_WORDS = "uint32_t a[4] = {words[0], words[1], words[2], words[threadIdx.x]};"
B_WORDS = "uint32_t b[2] = {words[4], words[threadIdx.x + 7]};"
FINISH = (
    "ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    "for (int i = 0; i < N / 2; ++i) global[i * 128 + threadIdx.x] = d[i];"
)
DESCRIPTORS = (
    "uint64_t a = ptx::wgmma_descriptor(shared, 16, 1024, 128);"
    "uint64_t b = ptx::wgmma_descriptor(shared + 8192, 16, 1024, 128);"
)


def mma(kind: str, name: str) -> Call:
    sums = "float d[4] = {global[1], global[2], global[3], global[4]};"
    code = f"{A_WORDS}{B_WORDS}{sums} ptx::mma_m16n8k16<{kind}>(d, a, b);" + store(
        "d[0] + d[1] + d[2] + d[3]"
    )
    return Call(code, rf"HMMA\.16816\.F32{name}")


def products(n: int, kind: str, trans_a: int, trans_b: int) -> Call:
    name = ".BF16" if kind == "bf16" else ""
    flags = r"\.tnspA" * trans_a + r"\.tnspB" * trans_b
    code = (
        f"constexpr int N = {n}; float d[N / 2]; {DESCRIPTORS} ptx::wgmma_fence();"
        f"ptx::wgmma<N, {kind}, {trans_a}, {trans_b}>(d, a, b, false);"
        f"ptx::wgmma<N, {kind}, {trans_a}, {trans_b}>(d, a + 2, b + 2, true); {FINISH}"
    )
    return Call(code, rf"HGMMA\.64x{n}x16\.F32{name} R\d+, gdesc\[UR\d+\]{flags}, R", WGMMA)


def products_of_registers(n: int, kind: str, trans_b: int) -> Call:
    name = ".BF16" if kind == "bf16" else ""
    code = (
        f"constexpr int N = {n}; float d[N / 2]; {DESCRIPTORS.replace(' a =', ' c =')} {A_WORDS}"
        f"ptx::wgmma_fence(); ptx::wgmma_ra<N, {kind}, {trans_b}>(d, a, b + c, false); {FINISH}"
    )
    flags = r"\.tnspB" * trans_b
    return Call(code, rf"HGMMA\.64x{n}x16\.F32{name} R\d+, R\d+, gdesc\[UR\d+\]{flags}", WGMMA)


def box(dims: int, store_: bool) -> Call:
    at = ", ".join(str(3 + i) for i in range(dims))
    if store_:
        return Call(f"ptx::tma_store_{dims}d(&map, shared, {at});", rf"UTMASTG\.{dims}D", HOPPER)
    return Call(f"ptx::tma_load_{dims}d(shared, &map, barrier, {at});", rf"UTMALDG\.{dims}D", HOPPER)


LDMATRIX = "uint32_t r[{0}]; ptx::{1}(r, shared + threadIdx.x * 16);"
STMATRIX = "uint32_t r[4] = {words[0], words[1], words[2], words[3]}; "
CALLS: dict[str, list[Call]] = {
    "shared_address": [Call(store("float(ptx::shared_address(shared + threadIdx.x))"))],
    "exp2_approx": [Call(store("ptx::exp2_approx(global[3])"), r"MUFU\.EX2")],
    "half_to_float": [Call(store("ptx::half_to_float(uint16_t(words[3]))"), r"HADD2\.F32")],
    "pack2": [
        Call("words[1] = ptx::pack2<bf16>(global[1], global[2]);", r"F2FP\.BF16"),
        Call("words[1] = ptx::pack2<fp16>(global[1], global[2]);", r"F2FP\.(F16\.F32\.)?PACK_AB"),
    ],
    "mma_m16n8k16": [mma("bf16", r"\.BF16"), mma("fp16", " ")],
    "ldmatrix_x4": [Call(LDMATRIX.format(4, "ldmatrix_x4") + each("r", 4), r"LDSM\.16\.M88\.4")],
    "ldmatrix_x4_transposed": [
        Call(LDMATRIX.format(4, "ldmatrix_x4_transposed") + each("r", 4), r"LDSM\.16\.MT88\.4")
    ],
    "ldmatrix_x2": [Call(LDMATRIX.format(2, "ldmatrix_x2") + each("r", 2), r"LDSM\.16\.M88\.2")],
    "ldmatrix_x2_transposed": [
        Call(LDMATRIX.format(2, "ldmatrix_x2_transposed") + each("r", 2), r"LDSM\.16\.MT88\.2")
    ],
    "cp_async_16": [
        Call("ptx::cp_async_16(shared + 16 * threadIdx.x, global, words[0] > 3);", r"LDGSTS\.E.*\.128")
    ],
    "cp_async_8": [
        Call("ptx::cp_async_8(shared + 8 * threadIdx.x, global, words[0] > 3);", r"LDGSTS\.E.*\.64")
    ],
    "cp_async_commit": [Call("ptx::cp_async_16(shared, global, true); ptx::cp_async_commit();", "LDGDEPBAR")],
    "cp_async_wait": [
        Call(
            "ptx::cp_async_16(shared, global, true); ptx::cp_async_commit(); ptx::cp_async_wait<1>();",
            "DEPBAR",
        )
    ],
    "named_barrier_sync": [Call("ptx::named_barrier_sync(3, 96);", r"BAR\.SYNC.* 0x3, 0x60")],
    "named_barrier_arrive": [Call("ptx::named_barrier_arrive(4, 128);", r"BAR\.ARV 0x4, 0x80")],
    "mbarrier_init": [Call("ptx::mbarrier_init(barrier, 5);", r"SYNCS\.EXCH\.64", HOPPER)],
    "fence_mbarrier_init": [Call("ptx::mbarrier_init(barrier, 5); ptx::fence_mbarrier_init();", "", HOPPER)],
    "mbarrier_arrive": [Call("ptx::mbarrier_arrive(barrier);", r"SYNCS\.ARRIVE\.TRANS64", HOPPER)],
    "mbarrier_arrive_expect": [
        Call("ptx::mbarrier_arrive_expect(barrier, 512);", r"SYNCS\.ARRIVE\.TRANS64", HOPPER)
    ],
    "mbarrier_wait": [
        Call(
            "ptx::mbarrier_wait(barrier, 1); ptx::mbarrier_wait(barrier, int(words[3]));",
            r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
            HOPPER,
        )
    ],
    "fence_async_shared": [
        Call("shared[threadIdx.x] = 1; ptx::fence_async_shared();", r"FENCE\.VIEW\.ASYNC", HOPPER)
    ],
    "tma_prefetch": [Call("ptx::tma_prefetch(&map);", r"UTMACCTL\.PF", HOPPER)],
    **{f"tma_load_{dims}d": [box(dims, False)] for dims in (2, 3, 4)},
    **{f"tma_store_{dims}d": [box(dims, True)] for dims in (2, 3, 4)},
    "bulk_load": [Call("ptx::bulk_load(shared, global, barrier, 256);", r"UBLKCP\.S\.G", HOPPER)],
    "tma_store_commit": [
        Call("ptx::tma_store_2d(&map, shared, 1, 2); ptx::tma_store_commit();", "UTMACMDFLUSH", HOPPER)
    ],
    "tma_store_wait": [
        Call("ptx::tma_store_commit(); ptx::tma_store_wait<1>();", r"DEPBAR\.LE SB0, 0x1", HOPPER)
    ],
    "tma_store_wait_read": [
        Call("ptx::tma_store_commit(); ptx::tma_store_wait_read<2>();", r"DEPBAR\.LE SB0, 0x2", HOPPER)
    ],
    "cluster_rank": [Call(store("float(ptx::cluster_rank())"), "SR_CgaCtaId", HOPPER)],
    "cluster_size": [Call(store("float(ptx::cluster_size())"), "", HOPPER)],
    "cluster_sync": [Call("ptx::cluster_sync();", r"UCGABAR_ARV[\s\S]*UCGABAR_WAIT", HOPPER)],
    "cluster_load": [
        Call("global[1] = ptx::cluster_load(reinterpret_cast<float*>(shared), 1);", r"\sLD\.E ", HOPPER),
        Call("barrier[1] = ptx::cluster_load(barrier, 1);", r"\sLD\.E\.64 ", HOPPER),
    ],
    "stmatrix_x4": [
        Call(STMATRIX + "ptx::stmatrix_x4(shared + threadIdx.x * 16, r);", r"STSM\.16\.M88\.4", HOPPER)
    ],
    "stmatrix_x4_transposed": [
        Call(
            STMATRIX + "ptx::stmatrix_x4_transposed(shared + threadIdx.x * 16, r);",
            r"STSM\.16\.MT88\.4",
            HOPPER,
        )
    ],
    "register_raise": [Call("ptx::register_raise<232>();", r"USETMAXREG\.TRY_ALLOC.* 0xe8", WGMMA, 384)],
    "register_lower": [Call("ptx::register_lower<40>();", r"USETMAXREG\.DEALLOC.* 0x28", WGMMA, 384)],
    "wgmma_fence": [Call("ptx::wgmma_fence();", r"WARPGROUP\.ARRIVE", WGMMA)],
    "wgmma_commit": [Call(f"{products(64, 'bf16', 0, 0).code}", "gsb0", WGMMA)],
    "wgmma_wait": [
        Call("ptx::wgmma_commit(); ptx::wgmma_wait<3>();", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x3", WGMMA)
    ],
    "wgmma_pin": [
        Call("float d[2] = {global[1], global[2]}; ptx::wgmma_pin(d);" + store("d[0] + d[1]"), "", WGMMA)
    ],
    "wgmma_descriptor": [
        Call("barrier[1] = ptx::wgmma_descriptor(shared + words[1], words[2], words[3], 64);", "", WGMMA)
    ],
    "wgmma": [
        products(n, kind, trans_a, trans_b)
        for n in (64, 128, 192, 256)
        for kind, trans_a, trans_b in (("bf16", 0, 0), ("fp16", 0, 1), ("bf16", 1, 1), ("fp16", 1, 0))
    ],
    "wgmma_ra": [
        products_of_registers(n, kind, trans_b)
        for n in (64, 128, 192, 256)
        for kind, trans_b in (("bf16", 1), ("fp16", 0))
    ],
}


def functions(name: str) -> list[str]:
    """The functions that a file of assembly defines."""
    text = (sources.folder() / name).read_text(encoding="utf-8")
    return re.findall(r"^\s*DEVICE \w+ (\w+)(?:<\w+>)?\(", text, re.MULTILINE)


def unit(calls: list[tuple[str, Call]]) -> str:
    """A source with one kernel a call."""
    head = f'#include "{sources.folder() / "ptx.cuh"}"\n'
    return head + "".join(
        f"""extern "C" __global__ void __launch_bounds__({call.threads}, 1)
        {name}(const __grid_constant__ TensorMap map, float* global, uint32_t* words) {{
          SHARED_MEMORY(shared);
          uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 65536);
          {call.code}
        }}\n"""
        for name, call in calls
    )


def compile_unit(text: str, target: str, folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    nvcc = compiler()
    assert nvcc is not None
    source, cubin = folder / "unit.cu", folder / "unit.cubin"
    source.write_text(text, encoding="utf-8")
    command = [
        nvcc.path,
        "-std=c++17",
        "-cubin",
        f"-arch={target}",
        "-Xptxas",
        "-v",
        "-diag-suppress=177,549",
    ]
    command += ["-Xcudafe", "--display_error_number", str(source), "-o", str(cubin)]
    return cubin, subprocess.run(command, capture_output=True, text=True, check=False)


def kernels_of(families: tuple[str, ...]) -> list[tuple[str, Call]]:
    return [
        (f"{name}_{place}", call)
        for name, calls in CALLS.items()
        for place, call in enumerate(calls)
        if call.family in families
    ]


def check_order_of_results(code: str) -> None:
    """d[i] is stored at i * 512 bytes: its register must be number i of those that the product names."""
    base = int(re.findall(r"HGMMA\.\S+ R(\d+),", code)[-1])
    stores = re.findall(r"STG\.E \S+\[R\d+\.64(?:\+0x([0-9a-f]+))?\], R(\d+)", code)
    assert len(stores) in (32, 64, 96, 128)
    assert sorted(int(offset or "0", 16) // 512 for offset, _ in stores) == list(range(len(stores)))
    assert all(int(register) == base + int(offset or "0", 16) // 512 for offset, register in stores)


def check_order_of_operands(code: str) -> None:
    """words[i] is operand a[i] (i up to 2: the last comes from elsewhere), and words[4] is b[0] of a warp."""
    operands = re.findall(r"HG?MMA\.\S+ R\d+, R(\d+), (?:R(\d+))?", code)
    assert len(operands) == 1
    a, b = operands[0]
    loads = re.findall(r"LDG\.E R(\d+), (?:\S+)?\[R\d+\.64(?:\+0x([0-9a-f]+))?\]", code)
    places = {int(register): int(offset or "0", 16) // 4 for register, offset in loads}
    assert [places[int(a) + i] for i in range(3)] == [0, 1, 2]
    assert not b or places[int(b)] == 4


def test_every_function_is_used() -> None:
    found = functions("ptx.cuh") + functions("ptx_hopper.cuh")
    assert "asm" not in (sources.folder() / "descriptor.cuh").read_text(encoding="utf-8")
    assert len(found) > 40
    assert set(found) == set(CALLS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_functions_become_their_instructions(target: str, tmp_path: Path) -> None:
    calls = kernels_of(TARGETS[target])
    cubin, done = compile_unit(unit(calls), target, tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    # A lone setmaxnreg, commit or wait has nothing to do and says so; a product that is serialised would too.
    assert "serialized" not in said, said
    parts = re.split(r"\bFunction : (\w+)", sass(cubin))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(code) == {name for name, _ in calls}
    for name, call in calls:
        if "HGMMA" in call.instruction:
            check_order_of_results(code[name])
        if name.startswith(("wgmma_ra_", "mma_")):
            check_order_of_operands(code[name])
    missing = [
        f"{name}: {call.instruction}" for name, call in calls if not re.search(call.instruction, code[name])
    ]
    assert not missing


@pytest.mark.parametrize("target", ["sm_80", "sm_100a"])
def test_what_an_architecture_lacks_is_not_declared(target: str, tmp_path: Path) -> None:
    """Each function of a family that the target does not have is an error of the compiler, not of ptxas or the GPU."""
    lacking = tuple(family for family in (HOPPER, WGMMA) if family not in TARGETS[target])
    # One use of each: nvcc stops after a hundred errors.
    calls = [(name, call) for name, call in kernels_of(lacking) if name.endswith("_0")]
    _, done = compile_unit(unit(calls), target, tmp_path)
    refused = set(re.findall(r'namespace "ptx" has no member "(\w+)"', done.stdout + done.stderr))
    assert done.returncode != 0
    assert refused == {name.rsplit("_", 1)[0] for name, _ in calls}
