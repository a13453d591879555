"""Run one step again from the checkpoint before it, and name the first thing in it that is not finite."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config import RunConfig
from megalite.parallel.collectives import gather_objects
from megalite.parallel.mesh import Mesh
from megalite.train.setup import Session, build_session, prepare_process


@dataclass(slots=True)
class Findings:
    """What a replayed step showed, in the order it happened."""

    step: int
    replayed_from: int
    loss: float = float("nan")
    grad_norm: float = float("nan")
    skipped: bool = False
    first_bad_module: str = ""
    """First module whose output held a non-finite value; empty if all were finite."""
    micro_batch: int = -1
    """The micro-batch in which that happened."""
    bad_parameters: list[str] = field(default_factory=list)
    """Parameters whose own value or reduced gradient is not finite."""


def replay(config: RunConfig, mesh: Mesh, step: int) -> tuple[Findings, Session]:
    """Repeat the run up to (1-based) `step`, and watch that step's forward pass and gradients.

    The data order, the weights and the arithmetic are functions of the configuration and the checkpoint, so
    the step is the same as it was (but for the last bits if it was compiled: here it is not). Nothing is written to
    the run directory.

    Raises:
        UserError: the run's data, configuration and checkpoint do not fit together.
    """
    # Modules are watched one by one, which a compiled block or a graph does not have.
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, compile=False, cuda_graph=False)
    )
    prepare_process(config, mesh)
    session = build_session(config, mesh, replay_step=step)
    trainer = session.trainer
    findings = Findings(step=step, replayed_from=trainer.completed_steps)
    while trainer.completed_steps < step - 1:
        result, _ = trainer.train_step(trainer.completed_steps, session.stop)
        trainer.completed_steps = result.step
    watches = _watch_outputs(trainer.model, findings)
    result, _ = trainer.train_step(step - 1, session.stop)
    for watch in watches:
        watch.remove()
    findings.loss, findings.grad_norm = result.loss.item(), result.grad_norm.item()
    findings.skipped = bool(result.verdict.skip.item())
    boxes = [box for kind in ("main_grad", "master") for box in trainer.state.boxes(kind)]
    bad = {box.piece.name for box in boxes if not torch.isfinite(box.tensor).all()}
    findings.bad_parameters = sorted(set().union(*gather_objects(bad, mesh.world)))
    trainer.loader.close()
    return findings, session


def _watch_outputs(model: nn.Module, findings: Findings) -> list[Any]:
    """Hooks that note the first module with a non-finite output."""

    def count(_module: nn.Module, _inputs: Any) -> None:
        if not findings.first_bad_module:
            findings.micro_batch += 1

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            finite = all(torch.isfinite(t).all() for t in tensors if isinstance(t, Tensor))
            if not finite and not findings.first_bad_module:
                findings.first_bad_module = name

        return hook

    hooks: list[Any] = [model.register_forward_pre_hook(count)]
    # Innermost modules fire first, so the first one noted is the smallest that already holds the bad value.
    hooks += [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    return hooks
