"""Metrics without a synchronisation per step: device scalars wait until the host asks for many at once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megalite.config import RunConfig
from megalite.optim.schedule import learning_rate
from megalite.train.flops import FlopsPerToken, Peak
from megalite.train.guard import Verdict
from megalite.train.memory import peak_memory_bytes
from megalite.train.timer import read_ms


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step leaves behind: device scalars, and marks of the timer."""

    step: int
    """Steps completed after it (1-based)."""
    loss: Tensor
    grad_norm: Tensor
    valid_tokens: Tensor
    bad_ranks: Tensor
    """[dp] float64: not 0 where a process's own loss or gradients were not finite."""
    verdict: Verdict
    marks: list[Any]

    def pack(self) -> Tensor:
        """All device scalars in one float64 vector [7]."""
        verdict, bad = self.verdict, self.bad_ranks > 0
        bad_rank = torch.where(bad.any(), bad.int().argmax(), -1)
        scalars = [self.loss, self.grad_norm, self.valid_tokens, verdict.skip, verdict.spike]
        values = [*scalars, verdict.bad_parameter, bad_rank]
        return torch.stack([value.double() for value in values])


class Metrics:
    """Collects step results and turns them into records when flushed.

    Args:
        config: the run.
        flops: FLOPs per token by term.
        peak: of one device, that MFU is measured against.
        num_devices: devices that work on the run.
        device: this process's device.
    """

    def __init__(
        self,
        config: RunConfig,
        flops: FlopsPerToken,
        *,
        peak: Peak,
        num_devices: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.flops = flops
        self.peak = Peak(peak.main * num_devices, peak.fp8 * num_devices)
        self.device = device
        self._pending: list[StepResult] = []
        self._packed: list[Tensor] = []

    def add(self, result: StepResult) -> None:
        """Keep one step's results; nothing is read from the device."""
        self._pending.append(result)
        self._packed.append(result.pack())

    def flush(self) -> list[dict[str, Any]]:
        """Records of the steps since the last flush. Waits for the device once."""
        if not self._pending:
            return []
        values = torch.stack(self._packed).cpu().tolist()
        peak_memory = peak_memory_bytes(self.device)
        records = [
            self._record(result, row, peak_memory) for result, row in zip(self._pending, values, strict=True)
        ]
        self._pending, self._packed = [], []
        return records

    def utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """MFU by both conventions, and HFU if products are made again.

        Of runs with FP8 products their rate against the bf16 peak alone, too.
        """
        flops, found = self.flops, {}
        for name, total in (("causal", flops.causal), ("full", flops.full)):
            ideal = flops.ideal_seconds(total, self.peak)
            found[f"mfu_{name}"] = tokens_per_s * ideal
            if flops.again:
                ideal += flops.ideal_seconds_again(self.peak, causal=name == "causal")
                found[f"hfu_{name}"] = tokens_per_s * ideal
        if flops.fp8_share:
            found["mfu_bf16_equivalent_causal"] = tokens_per_s * flops.causal / self.peak.main
        return found

    def _record(self, result: StepResult, row: list[float], peak_memory: int) -> dict[str, Any]:
        loss, grad_norm, valid_tokens, skip, spike, bad_parameter, bad_rank = row
        times = read_ms(result.marks)
        step = result.step
        batch = self.config.train.batch_size_at(step - 1)
        rate = batch * self.config.train.seq_length / (times["step"] / 1e3)
        record: dict[str, Any] = {
            "step": step,
            "tokens": self.config.train.tokens_before(step),
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(self.config, step - 1),
            "global_batch_size": batch,
            "valid_tokens": int(valid_tokens),
            "skipped": int(skip),
            "spike": int(spike),
            "tokens_per_s": rate,
            **self.utilisation(rate),
            "peak_memory_bytes": peak_memory,
        }
        record |= {f"{phase}_ms": value for phase, value in times.items()}
        if skip:
            record |= {"bad_parameter": int(bad_parameter), "bad_rank": int(bad_rank)}
        return record


class ProgressLine:
    """A live line on a terminal, plain lines elsewhere, on standard error; silent when disabled."""

    def __init__(self, total_steps: int, *, enabled: bool, first_step: int = 0) -> None:
        self.total_steps = total_steps
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self._live: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._live = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._live.add_task("train", total=total_steps, completed=first_step, text="")
            self._live.start()

    def update(self, records: list[dict[str, Any]]) -> None:
        """Show the mean over the records of one flush."""
        if not records:
            return
        last = records[-1]
        seconds = sum(r["step_ms"] for r in records) / 1e3
        tokens = sum(r["tokens_per_s"] * r["step_ms"] / 1e3 for r in records)
        mean = {key: sum(r[key] for r in records) / len(records) for key in ("loss", "grad_norm")}
        mfu = {
            key: sum(r[key] * r["step_ms"] for r in records) / (seconds * 1e3)
            for key in ("mfu_causal", "mfu_full", "hfu_causal")
            if key in last
        }
        hfu = f" · HFU {mfu['hfu_causal']:.1%} causal" if "hfu_causal" in mfu else ""
        text = (
            f"loss {mean['loss']:.3f} · {tokens / seconds:,.0f} tok/s · MFU {mfu['mfu_causal']:.1%} causal "
            f"{mfu['mfu_full']:.1%} full{hfu} · grad norm {mean['grad_norm']:.2f} · lr {last['learning_rate']:.2e}"
        )
        if self._live is not None:
            self._live.update(self._task, completed=last["step"], text=text)
        else:
            remaining = (self.total_steps - last["step"]) * seconds / len(records)
            self.say(f"step {last['step']}/{self.total_steps} · {text} · ETA {remaining:.0f} s")

    def say(self, message: str) -> None:
        """Print a line of its own, unbroken (a log file has no width)."""
        self.console.print(message, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the terminal clean."""
        if self._live is not None:
            self._live.stop()
