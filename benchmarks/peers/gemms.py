"""The best matrix product of this device, in the model's own shapes too: what all contenders are held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.job import Job
from megalite.config import ModelConfig
from megalite_kernels.ops.linear import project, project_back
from megalite_kernels.products import OURS, TORCH, fast_products

SQUARES = (2048, 4096)


def linears(model: ModelConfig) -> set[tuple[int, int]]:
    """(outputs, inputs) of the model's different linear layers; q, k, v and gate, up also side by side."""
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.size_per_head
    queries, keys = model.num_attention_heads * head, model.kv_heads * head
    shapes = {(queries + 2 * keys, hidden), (hidden, queries), (ffn, hidden), (hidden, ffn)}
    if model.gated:
        shapes.add((2 * ffn, hidden))
    return shapes | {(model.vocab_size, hidden)}


def products(model: ModelConfig, tokens: int) -> dict[str, tuple[int, int, int, str]]:
    """Name → (M, N, K, kind) of every product: forward x·Wᵀ, of inputs dy·W, of weights dyᵀ·x."""
    found = {f"{n}x{n}x{n}": (n, n, n, "forward") for n in SQUARES}
    for outputs, inputs in sorted(linears(model)):
        for m, n, k, kind in (
            (tokens, outputs, inputs, "forward"),
            (tokens, inputs, outputs, "dgrad"),
            (outputs, inputs, tokens, "wgrad"),
        ):
            name = f"{m}x{n}x{k}"
            found.setdefault(name if name not in found else f"{name} {kind}", (m, n, k, kind))
    return found


def own_product(left: Tensor, right: Tensor, kind: str) -> Callable[[], object]:
    """The same product by this library, which on some CPUs is faster than torch's: a fraction above 1 would say so."""
    if kind == "forward":
        return lambda: project(left, right.t())
    if kind == "dgrad":
        return lambda: project_back(left, right)
    sums = torch.zeros(left.shape[0], right.shape[1])
    return lambda: torch.ops.megalite.linear_weight_grad_(left.t(), right, sums, False)


class Gemms:
    """Measures every product once a call, by torch and on CPUs by this library; remembers the best of each."""

    def __init__(self, job: Job) -> None:
        self.dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
        self.device, self.job = job.device, job
        self.best: dict[str, float] = {}
        self._fast = fast_products(self.dtype, self.device)

    def measure(self) -> dict[str, float]:
        """Name → best rate so far, TFLOP/s."""
        tokens = self.job.micro_batch_size * self.job.seq_length
        for name, (m, n, k, kind) in products(self.job.model, tokens).items():
            left, right = self._operands(m, n, k, kind)
            calls: list[Callable[[], object]] = []
            if TORCH in self._fast:
                calls.append(self._fast[TORCH](left, right))
            if OURS in self._fast:
                calls.append(own_product(left, right, kind))
            best = max(self._rate(call, 2 * m * n * k) for call in calls)
            self.best[name] = max(self.best.get(name, 0.0), best)
        return self.best

    def _rate(self, call: Callable[[], object], flops: int) -> float:
        """TFLOP/s of the second of two calls."""
        self._seconds(call)
        return flops / self._seconds(call) / 1e12

    def _operands(self, m: int, n: int, k: int, kind: str) -> tuple[Tensor, Tensor]:
        """Random ones (zeros draw less power and flatter the figure), laid out as training has them."""
        if kind == "wgrad":
            return self._random(k, m).t(), self._random(k, n)
        return self._random(m, k), self._random(k, n) if kind == "dgrad" else self._random(n, k).t()

    def _random(self, rows: int, columns: int) -> Tensor:
        generator = torch.Generator(device=self.device).manual_seed(0)
        return torch.randn(rows, columns, generator=generator, device=self.device).to(self.dtype)

    def _seconds(self, call: Callable[[], object]) -> float:
        repeats = 1 if self.device == "cpu" else 10
        clock = time.process_time if self.job.clock == "process" else time.perf_counter
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(repeats):
            call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / repeats
