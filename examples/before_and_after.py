"""What the two examples share: real text, and two models trained on it in turns."""

from __future__ import annotations

import argparse
import ctypes
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

VOCAB = 128 * 128
"""A token is two bytes of ASCII."""


def parse(argv: Sequence[str] | None, doc: str) -> argparse.Namespace:
    """Command line of an example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed training steps of each variant")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def read_batches(options: argparse.Namespace) -> Tensor:
    """Token ids [steps + 1, batch, length] on the device, from the source of Python's standard library."""
    shape = (options.steps + 1, options.batch, options.length)
    needed = 2 * shape[0] * shape[1] * shape[2]
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= needed:
            break
    pairs = torch.frombuffer(text[:needed], dtype=torch.uint8).long().view(-1, 2) % 128
    return (pairs[:, 0] * 128 + pairs[:, 1]).view(shape).to(options.device)


def compare(
    models: dict[str, nn.Module], loss_of: Callable[[nn.Module, Tensor], Tensor], batches: Tensor
) -> dict[str, float]:
    """Train "before" and "after" on the same batches, step by step in turns: losses, fastest step, peak memory."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    fastest = dict.fromkeys(models, float("inf"))
    figures: dict[str, float] = {}
    for number, batch in enumerate(batches):
        for name, model in models.items():
            start_memory_peak(batch.device)
            start = time.perf_counter()
            loss = loss_of(model, batch)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            losses[name].append(loss.item())
            if number > 0:  # the first step makes buffers and the optimizer's state
                fastest[name] = min(fastest[name], time.perf_counter() - start)
            figures[f"{name} peak MiB"] = memory_peak(batch.device)
    for name in models:
        figures[f"{name} tokens/s"] = batches[0].numel() / fastest[name]
        figures[f"{name} loss"] = losses[name][-1]
    differences = [abs(a - b) for a, b in zip(losses["before"], losses["after"], strict=True)]
    figures["first difference"], figures["largest difference"] = differences[0], max(differences)
    print_figures(figures)
    return figures


def start_memory_peak(device: torch.device) -> None:
    """Forget the highest memory use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the other variant has freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux, or not allowed: the figure covers the whole process then
        return


def memory_peak(device: torch.device) -> float:
    """Highest memory use since then in MiB, of both models together; NaN where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def print_figures(figures: dict[str, float]) -> None:
    """A small table."""
    print(f"\n{'':<12}{'tokens/s':>10}{'peak MiB':>10}{'last loss':>11}")
    for name in ("before", "after"):
        speed, peak, loss = (figures[f"{name} {key}"] for key in ("tokens/s", "peak MiB", "loss"))
        print(f"{name:<12}{speed:>10,.0f}{peak:>10,.0f}{loss:>11.4f}")
    first, largest = figures["first difference"], figures["largest difference"]
    print(f"losses differ by {first:.1e} in the first step and by at most {largest:.1e} in any")
