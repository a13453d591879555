"""Who takes part: names, what each needs, and how it is built."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from benchmarks.peers import libraries, plain
from benchmarks.peers.job import Job
from megalite.config import ModelConfig
from megalite.errors import UserError

WEIGHTS = {
    "autocast": "fp32 weights under autocast",
    "bf16w": "bf16 weights with fp32 masters",
    "": "fp32",
}
"""Suffix of a name → how a peer holds its weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One trainer."""

    name: str
    description: str
    build: Callable[[Job, dict[str, Tensor]], nn.Module] | None = None
    """Makes a peer's model; None is our own trainer."""
    refuse: Callable[[ModelConfig], str] = libraries.anything
    """Why it cannot train a model; empty if it can."""
    needs: str = ""
    """Package that must be installed, by its import name."""
    install: str = ""
    """How to get it."""
    compiled: bool = False
    weights: str = ""
    """A key of `WEIGHTS`."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    precision: str = ""
    """Of our own trainer, where it is not the run's."""
    keep_pages: bool = True
    """Takes the run's allocator setting; else glibc's default."""
    cuda_graph: bool = False
    """Of our own trainer."""
    default_on: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which it is part of a run that names no contenders."""

    @property
    def kind(self) -> str:
        """ours or peer."""
        return "ours" if self.build is None else "peer"

    def objection(self, job: Job) -> str:
        """Why it takes no part in a job here; empty if it does."""
        if job.device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed: {self.install}"
        return self.refuse(job.model)


OURS = "this trainer itself: data loader, clipping, guard and all"


def contenders(model: ModelConfig, precision: str) -> dict[str, Contender]:
    """Everybody who can be asked for with a model and a precision, by name, in the order of the table.

    In fp32 a peer has one form; else one under autocast and one with bf16 weights.
    """
    gated = model.norm == "rms"
    found = [Contender(name="megalite", description=OURS, precision="bf16" if precision == "fp8" else "")]
    if precision == "fp8":
        found.append(Contender(name="megalite-fp8", description=f"{OURS}; fp8 linears", precision="fp8"))
    found.append(
        Contender(
            name="megalite-default-malloc",
            description=f"{OURS}; glibc maps and unmaps each large tensor",
            devices=("cpu",),
            keep_pages=False,
            default_on=(),
        )
    )
    blocks = functools.partial(
        Contender, compiled=True, precision="bf16" if precision == "fp8" else "", default_on=("cuda",)
    )
    found.append(blocks(name="megalite-compiled", description=f"{OURS}; torch.compile for each block"))
    found.append(
        blocks(
            name="megalite-graph",
            description=f"{OURS}; torch.compile for each block, steps as CUDA graphs",
            cuda_graph=True,
            devices=("cuda",),
        )
    )
    hugging_face = f"hf-{model.family}"
    own = "plain-llama" if gated else "nanogpt-style"
    forms = [""] if precision == "fp32" else ["autocast", "bf16w"]
    for form in forms:
        found += _peers(hugging_face, own, form)
    return {contender.name: contender for contender in found}


def _peers(hugging_face: str, own: str, form: str) -> Iterator[Contender]:
    pip = "pip install --no-deps"
    hf = functools.partial(
        Contender, build=libraries.hugging_face, needs="transformers", install="pip install transformers"
    )
    mine = functools.partial(Contender, build=plain.build, refuse=plain.refuse)
    liger = functools.partial(libraries.hugging_face, liger=True)
    library = functools.partial(Contender, weights=form)
    how = WEIGHTS[form]
    end = f"-{form}" if form else ""
    autocast = form == "autocast"
    once: tuple[str, ...] = () if autocast else ("cpu", "cuda")  # by default in one form only
    yield hf(name=f"{hugging_face}{end}", description=f"transformers, sdpa, eager; {how}", weights=form)
    yield hf(
        name=f"{hugging_face}-compile{end}", description=f"transformers, sdpa, torch.compile; {how}",
        compiled=True, weights=form, default_on=once,
    )  # fmt: skip
    yield hf(
        name=f"{hugging_face}-liger{end}", description=f"transformers with Liger's kernels; {how}", build=liger,
        needs="liger_kernel", install=f"{pip} liger-kernel", devices=("cuda",), weights=form, default_on=once[1:],
    )  # fmt: skip
    yield mine(name=f"{own}{end}", description=f"plain PyTorch, eager; {how}", weights=form, default_on=once)
    fastest = functools.partial(mine, weights=form, compiled=True)
    yield fastest(name=f"{own}-compile{end}", description=f"plain PyTorch, torch.compile; {how}")
    yield fastest(
        name=f"{own}-compile{end}-default-malloc",
        description=f"plain PyTorch, torch.compile; {how}; glibc maps and unmaps each large tensor",
        devices=("cpu",),
        keep_pages=False,
        default_on=(),
    )
    yield library(
        name=f"litgpt{end}", description=f"litgpt's GPT, eager; {how}", build=libraries.litgpt,
        refuse=libraries.only_llama, needs="litgpt", install=f"{pip} litgpt", default_on=once,
    )  # fmt: skip
    yield library(
        name=f"torchtitan{end}", description=f"torchtitan's Llama, sdpa, eager; {how}", build=libraries.torchtitan,
        refuse=libraries.only_llama, needs="torchtitan", install=f"{pip} torchtitan spmd_types",
        default_on=once,
    )  # fmt: skip
    if autocast:  # Megatron's linear layers do not take part in it
        return
    yield library(
        name=f"megatron-core{end}", description=f"megatron-core's GPTModel, local layers, sdpa, eager; {how}",
        build=libraries.megatron, refuse=libraries.no_stretch, needs="megatron",
        install=f"{pip} megatron-core==0.16.1",
    )  # fmt: skip


def select(names: Sequence[str], job: Job) -> tuple[list[Contender], list[dict[str, str]]]:
    """Those who take part, and (name, reason) of who does not though it was asked for.

    Args:
        names: contenders; nobody means those that are worth their time, "all" everybody.
        job: what they are to train.

    Raises:
        UserError: an unknown name; the message has the known ones.
    """
    known = contenders(job.model, job.precision)
    for name in names:
        if name != "all" and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown contender {name!r}: {hint}Known: all, {', '.join(known)}")
    asked = [
        c
        for c in known.values()
        if "all" in names or c.name in names or (not names and job.device in c.default_on)
    ]
    reasons = {contender.name: contender.objection(job) for contender in asked}
    skipped = [{"name": name, "reason": reason} for name, reason in reasons.items() if reason]
    return [contender for contender in asked if not reasons[contender.name]], skipped
