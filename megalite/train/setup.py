"""From a configuration to a trainer that is ready for its next step: fresh, from given weights, or resumed."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.config import ModelConfig, RunConfig
from megalite.config_values import to_dict
from megalite.data.copying import CopyStream
from megalite.data.dataset import load_datasets, open_prepared
from megalite.data.loader import TrainLoader
from megalite.data.tokenize import Tokenizer
from megalite.data.validation import load_validation
from megalite.errors import UserError
from megalite.interop.hf import folder_texts, load_pieces, read_config_json, read_pieces
from megalite.interop.hf_config import config_from_hf
from megalite.models.families import hf_tensors
from megalite.models.transformer import Transformer
from megalite.optim.adamw import AdamW
from megalite.parallel.collectives import broadcast_object
from megalite.parallel.mesh import Mesh, host_axis
from megalite.parallel.random import initialize
from megalite.train.checkpoint import latest_checkpoint, read_manifest
from megalite.train.checkpoint_load import load_state
from megalite.train.checkpoint_snapshot import take_snapshot
from megalite.train.flops import (
    FlopsPerToken,
    Precision,
    choose_precision,
    flops_made_again,
    flops_per_token,
    peak_flops,
)
from megalite.train.graphed import cuda_graphs
from megalite.train.guard import StepGuard
from megalite.train.metrics import Metrics, ProgressLine
from megalite.train.process import changed_environment, environment
from megalite.train.replica import Replica, build_replica
from megalite.train.runlog import RunLog, TensorBoard
from megalite.train.saver import Saver
from megalite.train.stop import StopSignal
from megalite.train.timer import StepTimer
from megalite.train.trainer import Trainer
from megalite_kernels.memory import keep_freed_pages
from megalite_kernels.ops.fp8_linear import Scaling

FREE_TO_CHANGE = {
    "": {"name", "run_dir", "preset", "parallel", "recompute", "eval", "checkpoint"},
    "train": {
        "steps", "micro_batch_size", "device", "threads", "log_interval", "profile", "max_skipped_steps", "init_from",
        "compile", "cuda_graph", "gc_interval", "fp8_copies",
    },
    "optimizer": {"store_param_remainders"},
}  # fmt: skip
"""Settings that may differ when a run is continued: they change neither its data nor its arithmetic, or (the
number of steps) are how a run is prolonged."""


@dataclass(frozen=True, slots=True)
class Session:
    """A trainer and what belongs to the whole run around it."""

    config: RunConfig
    trainer: Trainer
    saver: Saver
    stop: StopSignal
    precision: Precision
    flops: FlopsPerToken
    resumed_from: Path | None
    changed_environment: tuple[str, ...] = ()
    """What differs from the process that wrote the checkpoint, and may change the last bits of the losses."""


def prepare_process(config: RunConfig, mesh: Mesh) -> None:
    """Settings of the whole process that a run needs: threads, memory, deterministic kernels.

    Called by commands that own their process, never by importing something.
    """
    if mesh.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if config.train.cuda_graph:
            # The default stream cannot be captured, and autograd remembers on which stream a weight was first used.
            torch.cuda.set_stream(torch.cuda.Stream(mesh.device))
    else:
        threads = config.train.threads or max(1, (os.cpu_count() or 1) // mesh.local_size)
        torch.set_num_threads(threads)
        keep_freed_pages()
    if config.train.compile:
        torch.use_deterministic_algorithms(True)
    else:  # the same mode, without Inductor's part of it, whose import takes a second
        torch.set_deterministic_debug_mode("error")
    # The mode above would also fill every new tensor with NaN, a write more for each of them.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_session(config: RunConfig, mesh: Mesh, *, replay_step: int | None = None) -> Session:
    """Everything up to the first (or next) step.

    If the run directory holds a checkpoint, the run is resumed from the newest one.

    Args:
        config: the run.
        mesh: the processes.
        replay_step: go back to the newest checkpoint before this (1-based) step, and write no records.

    Raises:
        UserError: data, weights, checkpoint and configuration do not fit together; the message says which.
    """
    tokenizer = open_prepared(config.data.datasets)[0].tokenizer()
    config = dataclasses.replace(config, model=settle_model(config, tokenizer))
    validate_layout(config, mesh)
    found, manifest = find_checkpoint(config, mesh, tokenizer, replay_step)
    measured = settle_precision(config, mesh, manifest) if mesh.is_first else None
    precision: Precision = broadcast_object(measured, mesh.world)
    replica = _make_replica(config, mesh, precision, filled=manifest is not None)
    optimizer = AdamW(replica.state, config.optimizer, mesh.world)
    guard = StepGuard(mesh.device, sigma=config.train.spike_sigma, skip_spikes=config.train.skip_spikes)
    host = host_axis(mesh)
    if found and manifest:
        tensors, tied = hf_tensors(config.model), mesh.tied.rank
        state = load_state(found, manifest, replica.state, tensors, axis=host, tied_rank=tied)
        optimizer.step_count.copy_(state.pop("step_count"))
        guard.load_state(state)
    length = config.train.seq_length
    flops = flops_per_token(config.model, length, fp8_scaling(config, precision))
    flops.again.update(flops_made_again(config.model, length, replica.model.recompute))
    trainer = _make_trainer(
        config,
        replica,
        optimizer,
        guard,
        tokenizer,
        flops,
        precision,
        step=manifest["step"] if manifest else 0,
        recording=mesh.is_first and replay_step is None,
    )
    keep, asynchronous = config.checkpoint.keep_last, config.checkpoint.asynchronous
    saver = Saver(Path(config.directory) / "checkpoints", keep=keep, asynchronous=asynchronous, axis=host)
    trainer.save = lambda done: save_checkpoint(trainer, saver, precision, done)
    changed = (
        changed_environment(manifest["environment"], environment(mesh, config.parallel)) if manifest else ()
    )
    return Session(config, trainer, saver, StopSignal(mesh), precision, flops, found, changed)


def validate_layout(config: RunConfig, mesh: Mesh) -> None:
    """Check the model and the batch against the degrees of parallelism.

    Raises:
        UserError: one of them cannot be cut that way; names the values that can.
    """
    config.parallel.validate_model(config.model)
    if config.train.cuda_graph and (mesh.device.type != "cuda" or mesh.world_size > 1):
        raise UserError(
            f"train.cuda_graph=true captures the step of one process on a GPU, not of {mesh.world_size} on "
            f"{mesh.device.type}: set train.cuda_graph=false"
        )
    config.train.validate_world(mesh.dp.size)
    config.validate_fp8()
    for size in config.train.batch_sizes:
        config.parallel.validate_microbatches(size // (config.train.micro_batch_size * mesh.dp.size))
    tokens = config.train.micro_batch_size * config.train.seq_length
    parts = (2 * mesh.cp.size if mesh.cp.size > 1 else 1) * (
        mesh.tp.size if config.parallel.sequence_parallel else 1
    )
    if tokens % parts:
        raise UserError(
            f"train.micro_batch_size · train.seq_length = {tokens} tokens must be a multiple of {parts} to be divided "
            f"over parallel.tp={mesh.tp.size} (sequence parallel) and 2 · parallel.cp={mesh.cp.size} chunks"
        )


def find_checkpoint(
    config: RunConfig, mesh: Mesh, tokenizer: Tokenizer, replay_step: int | None
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from and its manifest, the same on all ranks; (None, None) for a fresh run.

    Raises:
        UserError: it belongs to a run with other settings, or to another tokenizer.
    """
    run_dir = Path(config.directory)
    newest = latest_checkpoint(run_dir / "checkpoints", before_step=replay_step) if mesh.is_first else None
    found: Path | None = broadcast_object(newest, mesh.world)
    if found is None:
        return None, None
    manifest = read_manifest(found)
    check_same_run(manifest["config"], to_dict(config), run_dir)
    check_tokenizer(manifest["tokenizer_fingerprint"], tokenizer.fingerprint, found)
    return found, manifest


def _make_replica(config: RunConfig, mesh: Mesh, precision: Precision, *, filled: bool) -> Replica:
    """This process's part of the model; with `filled` its weights will come from a checkpoint."""
    replica = build_replica(
        config.model,
        config.parallel,
        mesh,
        dtype=precision.dtype,
        micro_batch_tokens=config.train.micro_batch_size * config.train.seq_length,
        seq_length=config.train.seq_length,
        fill=lambda model: None if filled else fill_weights(model, config),
        recompute=config.recompute,
        num_microbatches=config.train.global_batch_size // (config.train.micro_batch_size * mesh.dp.size),
        compile_backend="inductor" if config.train.compile else "",
        fp8=fp8_scaling(config, precision),
        remainders=config.optimizer.store_param_remainders,
    )
    replica.fp8_copies = config.train.fp8_copies
    return replica


def _make_trainer(
    config: RunConfig,
    replica: Replica,
    optimizer: AdamW,
    guard: StepGuard,
    tokenizer: Tokenizer,
    flops: FlopsPerToken,
    precision: Precision,
    *,
    step: int,
    recording: bool,
) -> Trainer:
    """The trainer after `step` completed steps; `recording` is whether this process writes the run's files."""
    mesh, run_dir = replica.mesh, Path(config.directory)
    log = RunLog(run_dir, enabled=recording)
    log.continue_after(step)
    datasets = config.data.datasets
    trainer = Trainer(
        config=config,
        replica=replica,
        optimizer=optimizer,
        guard=guard,
        loader=TrainLoader(
            load_datasets(datasets, seq_length=config.train.seq_length, seed=config.data.seed),
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            pin_memory=mesh.device.type == "cuda",
        ),
        validation=load_validation(datasets),
        tokenizer=tokenizer,
        metrics=Metrics(
            config,
            flops,
            peak=peak_flops(precision, mesh.device),
            num_devices=mesh.world_size,
            device=mesh.device,
        ),
        log=log,
        tensorboard=TensorBoard(run_dir / "tensorboard", enabled=recording, first_step=step),
        progress=ProgressLine(config.train.steps, enabled=mesh.is_first, first_step=step),
        timer=StepTimer(mesh.device),
        copies=CopyStream(mesh.device),
        save=lambda done: None,
        completed_steps=step,
    )
    if config.train.cuda_graph:
        trainer.graphs = cuda_graphs(trainer.compute, config.train.seq_length)
    return trainer


def settle_model(config: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's configuration with the vocabulary size set, or that of `train.init_from`.

    Raises:
        UserError: the data has token ids that the model's vocabulary does not, or the given weights belong to
            another tokenizer.
    """
    model = config.model
    if config.train.init_from:
        folder = Path(config.train.init_from)
        model = config_from_hf(read_config_json(folder))
        if (folder / "tokenizer.json").exists():
            stored = Tokenizer.load(folder, eod_token=tokenizer.eod_token, add_eod=True)
            check_tokenizer(stored.fingerprint, tokenizer.fingerprint, folder)
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the data's tokenizer, which has "
            f"{tokenizer.vocab_size} ids: set model.vocab_size=0 to take it from the data"
        )
    return model


def settle_precision(config: RunConfig, mesh: Mesh, manifest: dict[str, Any] | None) -> Precision:
    """The run's compute type: measured now, or as the checkpoint recorded it."""
    measured = choose_precision(config.train.precision, mesh.device)
    if not manifest:
        return measured
    chosen = manifest["precision"]["chosen"]
    return dataclasses.replace(
        measured, chosen=chosen, reason=f"as in the checkpoint ({manifest['precision']['reason']})"
    )


def fp8_scaling(config: RunConfig, precision: Precision) -> Scaling | None:
    """How the blocks' products are scaled, if they are made in FP8."""
    return config.train.fp8_scaling if precision.chosen == "fp8" else None


def fill_weights(model: Transformer, config: RunConfig) -> None:
    """Initial weights: drawn from the seed, or read from `train.init_from`."""
    if config.train.init_from:
        load_pieces(model, read_pieces(config.train.init_from, config.model))
    else:
        initialize(model, config.train.seed)


def check_same_run(stored: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Raise if a run is continued with settings that would make it another run.

    Raises:
        UserError: naming every field that differs.
    """
    differing, defaults = [], to_dict(RunConfig())
    for key in sorted(stored.keys() | now.keys()):
        if key in FREE_TO_CHANGE[""]:
            continue
        old, new = stored.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            old = {**defaults[key], **old}  # what the stored run's version had no setting for
            free = FREE_TO_CHANGE.get(key, set())
            names = sorted((old.keys() | new.keys()) - free)
            differing += [
                f"{key}.{n}: {old.get(n)!r} then, {new.get(n)!r} now"
                for n in names
                if old.get(n) != new.get(n)
            ]
        elif old != new:
            differing.append(f"{key}: {old!r} then, {new!r} now")
    if differing:
        raise UserError(
            f"{run_dir} holds a run with other settings ({'; '.join(differing)}): choose another --run-dir, "
            "or give the same settings to continue it"
        )


def check_tokenizer(stored: str, now: str, where: Path) -> None:
    """Raise if weights and data were made with different tokenizers."""
    if stored != now:
        raise UserError(
            f"{where} was made with tokenizer {stored[:12]}, the data with {now[:12]}: prepare the data with the same "
            "--tokenizer"
        )


def save_checkpoint(trainer: Trainer, saver: Saver, precision: Precision, step: int) -> None:
    """Snapshot the run after `step` completed steps; all ranks write it in the background, each what it holds.

    A write that fails on any of them (a full disk) ends the run, with every earlier checkpoint intact.
    """
    saver.wait()  # before the snapshot is taken: two of them may be more than the host's memory holds
    config = trainer.config
    texts = folder_texts(
        config.model, tokenizer=trainer.tokenizer.definition, eod_id=trainer.tokenizer.eod_id
    )
    snapshot = take_snapshot(
        trainer.state,
        hf_tensors(config.model),
        {"step_count": trainer.optimizer.step_count, **trainer.guard.state()},
        step=step,
        metadata={
            "tokens": config.train.tokens_before(step),
            "samples": config.train.samples_before(step),
            "config": to_dict(config),
            "precision": dataclasses.asdict(precision),
            "tokenizer_fingerprint": trainer.tokenizer.fingerprint,
            "environment": environment(trainer.mesh, config.parallel),
        },
        texts={f"weights/{name}": text for name, text in texts.items()},
        tied_rank=trainer.mesh.tied.rank,
        only=saver.mine,
    )
    saver.save(snapshot)
    trainer.log.event("checkpoint", step)
