"""What instances, tensor maps and launches must be before anything looks at them; which device gets them."""

from __future__ import annotations

import pytest
import torch

from megalite_kernels.native.cuda import runtime, sources
from megalite_kernels.native.cuda.kernel import Kernel, TensorMap, check_arguments, instance
from megalite_kernels.ops.cuda_support import cuda_half_supports, cuda_supports

ANY = instance("any.cuh", "any", threads=64, cluster=2, target="sm_90", B=1)


def test_an_instance_is_sorted_and_says_what_it_is():
    kernel = instance("a.cuh", "f", threads=128, Z=1, A="bf16")
    assert kernel.defines == (("A", "bf16"), ("THREADS", 128), ("Z", 1))
    assert str(kernel) == "f (A=bf16, THREADS=128, Z=1)"
    assert sources.define_options(kernel) == ["-DKERNEL_f=1", "-DA=bf16", "-DTHREADS=128", "-DZ=1"]
    assert kernel == instance("a.cuh", "f", threads=128, A="bf16", Z=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threads": 2048}, "1 to 1024, not 2048"),
        ({"shared_bytes": 300000}, "up to 232448 bytes of shared memory, not 300000"),
        ({"cluster": 16}, "1 to 8 blocks, not 16"),
        ({"target": "sm_70"}, "the target is one of"),
    ],
)
def test_an_instance_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        instance("a.cuh", "f", **({"threads": 32} | wrong))


def test_an_instance_has_its_threads_among_its_defines():
    with pytest.raises(ValueError, match="needs the define THREADS=32"):
        Kernel("a.cuh", "f", (), 32)
    with pytest.raises(ValueError, match="sorted by name"):
        Kernel("a.cuh", "f", (("THREADS", 32), ("A", 1)), 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (1,) * 6}, "1 to 5 dims, not 6"),
        ({"strides_bytes": ()}, "need 2 box sizes and 1 strides"),
        ({"shape": (64, 0)}, "dims of a tensor map are 1 to"),
        ({"box": (64, 257)}, "sides of the box are 1 to 256"),
        ({"strides_bytes": (130,)}, "multiples of 16 bytes"),
        ({"swizzle": 16}, "the swizzle is one of"),
        ({"box": (4, 8)}, "a row of the box is a multiple of 16 bytes, not 8"),
        ({"swizzle": 64}, "up to 64 bytes with that swizzle, not 128"),
    ],
)
def test_a_tensor_map_that_cannot_be(changes, message):
    right = {"shape": (64, 8), "strides_bytes": (128,), "box": (64, 8), "swizzle": 128}
    TensorMap(torch.zeros(512, dtype=torch.bfloat16), **right)
    with pytest.raises(ValueError, match=message):
        TensorMap(torch.zeros(512, dtype=torch.bfloat16), **(right | changes))


@pytest.mark.parametrize(
    ("grid", "args", "message"),
    [
        ((1, 1), (), "a grid has 3 sides"),
        ((2, 65536, 1), (), "up to"),
        ((3, 1, 1), (), "3 blocks along x are no multiple of its cluster of 2"),
        ((2, 1, 1), (2, True), "argument 1 is a bool"),
    ],
)
def test_a_launch_that_cannot_be(grid, args, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(ANY, grid, args)


def test_an_empty_grid_is_nothing_to_do():
    """Neither a driver nor the emulator is asked."""
    for device in ("cuda", "cpu"):
        runtime.launch(ANY, (0, 1, 1), [], torch.device(device))


@pytest.mark.parametrize(("text", "expected"), [("80", 80), ("90", 90), ("100", 100)])
def test_the_emulated_architecture(monkeypatch, text, expected):
    monkeypatch.setenv(runtime.EMULATE, text)
    assert runtime.arch(torch.device("cpu")) == expected


@pytest.mark.parametrize("text", ["", "1", "75"])
def test_another_architecture_is_not_emulated(monkeypatch, text):
    monkeypatch.setenv(runtime.EMULATE, text)
    with pytest.raises(RuntimeError, match="set it to 80, 90 or 100"):
        runtime.arch(torch.device("cpu"))


def test_what_cuda_kernels_take(monkeypatch):
    monkeypatch.delenv(runtime.EMULATE, raising=False)
    x = torch.zeros(2)
    assert "runs on GPUs, a tensor is on cpu" in (cuda_supports(x, 1.0) or "")
    monkeypatch.setenv(runtime.EMULATE, "80")
    assert cuda_supports(x, 1.0, None, [x, x]) is None
    assert cuda_supports(x.double()) == "takes bfloat16, float16 and float32, not torch.float64"
    assert cuda_supports([x, x.double()]) == "takes bfloat16, float16 and float32, not torch.float64"
    assert cuda_half_supports(x, x) == "takes bfloat16 and float16, not torch.float32"
    assert cuda_half_supports(x.half(), x) is None
    assert "a tensor is on meta" in (cuda_supports(x.to("meta")) or "")
