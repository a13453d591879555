"""The loader on a real GPU: what the stand-in for libcuda can't prove. `make gpu-check` runs it there."""

from __future__ import annotations

import threading

import pytest
import torch

from megalite_kernels.native.cuda import driver, nvrtc, runtime
from megalite_kernels.native.cuda.kernel import instance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ADD = """
#if defined(KERNEL_add)
extern "C" __global__ void __launch_bounds__(THREADS) add(float* x, const float* y, long long count, float factor) {
  extern __shared__ unsigned char memory[];
  float* own = reinterpret_cast<float*>(memory + SHARED - 4 * THREADS);
  const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
  own[threadIdx.x] = i < count ? x[i] : 0.0f;
  __syncthreads();
  if (i < count) x[i] = own[threadIdx.x] + factor * (y == nullptr ? 1.0f : y[i]);
}
#endif
"""


def add(shared_bytes=1024, cluster=1):
    """Adds a multiple; its block's values stand at the end of its shared memory."""
    return instance(
        "add.cuh", "add", threads=128, shared_bytes=shared_bytes, cluster=cluster, SHARED=shared_bytes,
        target="sm_80" if cluster == 1 else "sm_90",
    )  # fmt: skip


@pytest.fixture
def source(folder):
    (folder / "add.cuh").write_text(ADD)


@pytest.fixture
def x():
    return torch.arange(1000.0, device="cuda")


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("shared_bytes", [1024, 96 << 10])
def test_numbers(x, shared_bytes):
    y = torch.rand(1000, device="cuda")
    expected = x + 0.5 * y
    runtime.launch(add(shared_bytes), (8, 1, 1), [x, y, 1000, 0.5], x.device)
    torch.testing.assert_close(x, expected)


@pytest.mark.usefixtures("source")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs clusters"
)
def test_clusters(x):
    expected = x + 2
    runtime.launch(add(cluster=4), (8, 1, 1), [x, None, 1000, 2.0], x.device)
    torch.testing.assert_close(x, expected)


@pytest.mark.usefixtures("source")
def test_a_launch_is_on_the_current_stream(x):
    """Behind a wait of the stream: with another one the sum would be of what x was before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        runtime.launch(add(), (8, 1, 1), [x, None, 1000, 2.0], x.device)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(x, torch.full_like(x, 3.0))


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("before", [True, False], ids=["loaded before", "loaded while capturing"])
def test_a_captured_launch_is_replayed(x, before):
    kernel = add(2048 if before else 4096)
    if before:
        runtime.launch(kernel, (8, 1, 1), [x, None, 1000, 0.0], x.device)
    expected = x + 6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runtime.launch(kernel, (8, 1, 1), [x, None, 1000, 2.0], x.device)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(x, expected)


@pytest.mark.usefixtures("source")
def test_a_new_thread_may_launch(x):
    """One that has called nothing of CUDA has no current context."""
    expected = x + 1
    torch.cuda.synchronize()
    thread = threading.Thread(
        target=runtime.launch,
        args=(add(8192), (8, 1, 1), [x, None, 1000, 1.0], torch.device("cuda", x.get_device())),
    )
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    torch.testing.assert_close(x, expected)


@pytest.mark.usefixtures("source")
def test_a_launch_that_is_refused_says_so(x):
    """More shared memory than was asked for when loading: the driver itself objects."""
    kernel = add(16384)
    found = driver.load(kernel, x.get_device())
    greedy = instance("add.cuh", "add", threads=128, shared_bytes=90 << 10, SHARED=16384)
    driver._loaded[x.get_device(), greedy] = found
    try:
        with pytest.raises(
            RuntimeError, match=r"was not launched: CUDA_ERROR_INVALID_VALUE.*92160 bytes of shared"
        ):
            runtime.launch(greedy, (8, 1, 1), [x, None, 1000, 1.0], x.device)
    finally:
        del driver._loaded[x.get_device(), greedy]


def test_nvrtc_is_found_beside_torch():
    assert nvrtc.find(int(torch.version.cuda.split(".")[0])) is not None
