"""Proof that layouts compute one and the same model: every one of them against one process.

`Verification.run` compares one layout. Each runs in float64 first, where it must
equal one process to 1e-10 of the model's largest gradient, then in the type of the run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.train.verify_compare import Check, Measure, judge, measure
from megalite.train.verify_explain import Finding, explain
from megalite.train.verify_layouts import OWN, Layout, reason_against
from megalite.train.verify_model import shrink_model, takes, tokens_for, with_layers
from megalite.train.verify_pool import LayoutError, Pool, RankError
from megalite.train.verify_run import Answer, Task, Truth, run_rank, trace_truth, truth

Status = Literal["equal", "wrong", "failed", "skipped"]
FLOAT64 = "float64"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one layout."""

    layout: Layout
    status: Status
    reason: str = ""
    """Why it was skipped or failed."""
    model: ModelConfig | None = None
    checks: dict[str, Check] = field(default_factory=dict)
    """By type; those after a wrong one are missing."""
    finding: Finding | None = None
    errors: tuple[RankError, ...] = ()
    seconds: float = 0.0


class Verification:
    """Everything that the layouts of one model share.

    Args:
        model: of the run.
        layouts: what to compare.
        dtype: type of the run, ``fp32``, ``bf16`` or one of `SCALINGS`; ``float64`` leaves it at that.
        device: where one process computes in the run's type.
    """

    def __init__(
        self, model: ModelConfig, layouts: Sequence[Layout], dtype: str, device: torch.device | str = "cpu"
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        self.layouts = layouts
        self.dtypes = list(dict.fromkeys((FLOAT64, dtype)))
        possible = [layout.parallel for layout in layouts if not reason_against(layout, model)]
        # Ulysses wants many key heads; that few of them are shared by ranks is what most layouts should show.
        usual = [parallel for parallel in possible if parallel.cp_method != "ulysses" or parallel.cp == 1]
        self.small = with_layers(
            shrink_model(model, usual or possible or [ParallelConfig()]), model, stages=1
        )
        self._truths: dict[tuple[ModelConfig, int, int], Truth] = {}
        self._references: dict[tuple[ModelConfig, int, int, str], tuple[Answer, list[Measure]]] = {}

    def task(self, layout: Layout, dtype: str) -> Task:
        """What the ranks of a layout compute: the small model with layers enough for it."""
        fitted = (
            self.small if takes(self.small, layout.parallel) else shrink_model(self.model, [layout.parallel])
        )
        model = with_layers(fitted, self.model, layout.parallel.num_stages)
        return Task(
            model,
            layout.parallel,
            layout.recompute,
            layout.dp,
            layout.micro_batches,
            tokens_for(layout.parallel),
            dtype,
        )

    def truth(self, task: Task) -> Truth:
        """One process's float64 numbers for the same model and data."""
        key = (task.model, task.micro_batches, task.tokens)
        if key not in self._truths:
            self._truths[key] = truth(task)
        return self._truths[key]

    def reference(self, task: Task) -> tuple[Answer, list[Measure]]:
        """What one process computes in the task's type, through the same code as the ranks but without a group."""
        key = (task.model, task.micro_batches, task.tokens, task.dtype)
        if key not in self._references:
            alone = dataclasses.replace(
                task, parallel=ParallelConfig(zero=0), recompute=RecomputeConfig(), dp=1
            )
            answer = run_rank(alone, Mesh(device=self.device))
            self._references[key] = answer, measure([answer], self.truth(task))
        return self._references[key]

    def _standard(self, task: Task) -> tuple[Truth, list[Measure] | None]:
        """What a task is held against: the truth and, where it is not float64, the errors of one process."""
        return self.truth(task), None if task.dtype == FLOAT64 else self.reference(task)[1]

    def one_process(self) -> Result:
        """The trainer's own step on one process against the plain loop: what all layouts are held against."""
        began = time.perf_counter()
        layout = Layout("one process", OWN, 1, ParallelConfig(zero=0))
        checks = {}
        for dtype in self.dtypes:
            task = self.task(layout, dtype)
            answer, measures = self.reference(task)
            checks[dtype] = judge(measures, dtype, None if dtype == FLOAT64 else measures)
            finding = explain(checks[dtype], [answer])
            if finding is not None:
                break
        seconds = time.perf_counter() - began
        return Result(layout, "wrong" if finding else "equal", "", task.model, checks, finding, (), seconds)

    def run(self, layout: Layout, pool: Pool) -> Result:
        """Compare one layout."""
        began = time.perf_counter()

        def result(status: Status, reason: str = "", **more: object) -> Result:
            return Result(layout, status, reason, seconds=time.perf_counter() - began, **more)  # type: ignore[arg-type]

        reason = reason_against(layout, self.model)
        if reason:
            return result("skipped", reason)
        checks: dict[str, Check] = {}
        for dtype in self.dtypes:
            task = self.task(layout, dtype)
            try:
                answers = pool.run(layout.world, run_layout, task, meanwhile=partial(self._standard, task))
            except LayoutError as error:
                return result(
                    "failed", str(error), model=task.model, checks=checks, errors=tuple(error.errors)
                )
            expected, one_process = self._standard(task)
            measures = measure(answers, expected)
            checks[dtype] = judge(measures, dtype, one_process, exact_sums=layout.exact)
            finding = explain(checks[dtype], answers)
            if finding is not None:
                finding = self._nearer(layout, task, pool) or finding
                return result("wrong", model=task.model, checks=checks, finding=finding)
        return result("equal", model=task.model, checks=checks)

    def _nearer(self, layout: Layout, task: Task, pool: Pool) -> Finding | None:
        """Run a wrong layout again with everything recorded that goes through the layers: the first that is wrong."""
        task = dataclasses.replace(task, trace=True)
        if task.dtype != FLOAT64:
            return None  # rounding of single activations is not bounded
        try:
            answers = pool.run(layout.world, run_layout, task)
        except LayoutError:
            return None
        measures = measure(answers, self.truth(task), trace_truth(task))
        return explain(judge(measures, FLOAT64, None, exact_sums=layout.exact), answers)


def preloaded(layouts: Sequence[Layout]) -> tuple[str, ...]:
    """Modules that the ranks will need: imported once, before they are forked."""
    modules = ["megalite.train.verify"]
    if any(layout.parallel.pp > 1 for layout in layouts):
        modules.append("torch.distributed.pipelining.schedules")
    if any(layout.parallel.zero == 3 for layout in layouts):
        modules.append("torch.distributed.fsdp")
    return tuple(modules)


def run_layout(task: Task, device: torch.device) -> Answer:
    """In a process of the pool: make the mesh of the layout and take the steps."""
    return run_rank(task, mesh_of_group(task.parallel, device))
