"""``megalite data prepare | inspect | who``: make a dataset, look into it, name the documents of a step."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megalite.cli.config_file import config_from_file, parse
from megalite.config import DatasetSpec, TrainConfig
from megalite.data.prepare import prepare
from megalite.data.stages import PrepareOptions
from megalite.errors import ExitCode, UserError

USAGE = """usage: megalite data COMMAND ...     (megalite data COMMAND --help says more)

commands:
  prepare    turn files and folders into a dataset folder
  inspect    documents, tokens, lengths, and the text of any document
  who        the documents that a training step reads"""
POSITION_UNITS = ("line", "byte", "row", "entry")


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Turn text into a dataset folder (tokens, index, tokenizer), in parallel and bounded memory.

    Inputs are files and folders of .txt, .md, source code, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, or a
    built-in corpus: stdlib (the Python standard library), torch (its source), botocore (English prose; needs
    that package). Killed at any moment, the same command goes on where it stopped. A text or source file is
    one document; exact duplicates are dropped; documents chosen by their hash are held out for validation.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders and built-in corpora (stdlib, torch, botocore), each optionally as NAME=PATH."""
    output: Annotated[str, tyro.conf.arg(aliases=["--out"])]
    """Dataset folder to make; must not exist (see --overwrite)."""
    source: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PATH, repeatable: a further input; validation is reported per name."""
    text_key: str = "text"
    """Key of JSON lines, or column of Parquet files, that holds the text."""
    tokenizer: str = ""
    """A tokenizer.json, or a folder with one; empty trains a byte-level BPE on sampled training text."""
    vocab_size: int = 4096
    """Size of the tokenizer that is trained (without --tokenizer)."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token; added to a tokenizer that lacks it."""
    validation_bytes: int = 500_000
    """Text held out for validation, at most 5 % of all (UTF-8 bytes); 0 holds nothing out."""
    validation_max_document_bytes: int = 100_000
    """Longer documents are never held out."""
    max_document_bytes: int = 1 << 20
    """Longer texts are cut at line ends into documents of about this size."""
    tokenizer_sample_bytes: int = 32_000_000
    """Training text, chosen by hash, that the tokenizer is trained on."""
    seed: int = 1234
    """Key of that sample."""
    on_error: Literal["stop", "skip"] = "stop"
    """Unreadable input (bad UTF-8, torn lines, truncated files): stop with its place, or skip, report and
    count."""
    workers: int = 0
    """Processes; 0 takes one per core."""
    overwrite: bool = False
    """Replace a finished dataset of the same name (it stays until the new one is complete)."""
    restart: bool = False
    """Throw away what an unfinished preparation into the same folder left."""
    json: bool = False
    """Print one JSON object (the contents of dataset.json) as the last line."""


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Check a dataset folder's files and show what is in them, or decode one document."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Dataset folder."""
    document: int | None = None
    """Show the text of this document instead."""
    split: Literal["train", "validation"] = "train"
    """Which split the document is in."""
    json: bool = False
    """Print one JSON object as the last line."""


@dataclass(frozen=True, kw_only=True)
class WhoArguments:
    """Name the documents that a training step reads.

    The order of samples is a pure function of the seed and the sample number, so nothing was recorded during
    the run. For a dataset folder, give the batch that the run used.
    """

    what: Annotated[str, tyro.conf.Positional]
    """Run directory, configuration file (.toml), or dataset folder."""
    step: int
    """Training step, as numbered in metrics.jsonl (from 1)."""
    seq_length: int = 256
    """Tokens per sample (dataset folders only)."""
    global_batch_size: int = 16
    """Samples per step (dataset folders only)."""
    seed: int = 1234
    """Key of the sample order (dataset folders only)."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    commands = {"prepare": _prepare, "inspect": _inspect, "who": _who}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return ExitCode.DONE if argv else ExitCode.BAD_INPUT
    if argv[0] not in commands:
        raise UserError(f"unknown command 'data {argv[0]}': use one of {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def _prepare(argv: list[str]) -> int:
    from megalite.cli.data_progress import StageProgress

    arguments = parse(PrepareArguments, argv, prog="megalite data prepare")
    shared = {f.name for f in fields(PrepareOptions)} & {f.name for f in fields(PrepareArguments)}
    values = {name: getattr(arguments, name) for name in shared}
    values["inputs"] = (*arguments.inputs, *arguments.source)
    with StageProgress() as progress:
        info = prepare(PrepareOptions(**values), progress)
    _print_prepared(arguments.output, info)
    if arguments.json:
        print(json.dumps({"output": arguments.output, **info}), flush=True)
    return ExitCode.DONE


def _print_prepared(output: str, info: dict[str, Any]) -> None:
    _print_splits(info["splits"])
    speed, dropped = info["speed"], info["duplicates"]
    print(
        f"dropped {dropped['documents']:,} duplicates ({dropped['bytes']:,} bytes), "
        f"{info['empty_documents']:,} empty documents; skipped {info['skipped_inputs']:,} unreadable inputs; "
        f"left out {info['ignored_files']:,} files of other types\n"
        f"vocabulary {info['vocab_size']:,} tokens, fingerprint {info['tokenizer_fingerprint'][:12]}\n"
        f"{speed['seconds']:.1f} s with {speed['workers']} workers; one core reads and hashes "
        f"{speed['scan_mb_per_s_per_core']} MB/s and encodes {speed['encode_mb_per_s_per_core']} MB/s: "
        f"encoding bounds the whole, {speed['tokenizer_share']:.0%} of it is the tokenizer\n"
        f"dataset {output}"
    )


def _print_splits(splits: dict[str, Any]) -> None:
    for split, totals in splits.items():
        rows = [(split, totals)]
        if len(totals["sources"]) > 1:
            rows += [(f"  {name}", counts) for name, counts in totals["sources"].items()]
        for name, counts in rows:
            ratio = counts["bytes"] / counts["tokens"] if counts["tokens"] else 0.0
            print(
                f"{name:<12} {counts['documents']:>12,} documents {counts['tokens']:>16,} tokens "
                f"{counts['bytes']:>16,} bytes {ratio:>6.2f} bytes per token"
            )


def _inspect(argv: list[str]) -> int:
    from megalite.data.dataset import PreparedDataset
    from megalite.data.inspect import document_report, inspect

    arguments = parse(InspectArguments, argv, prog="megalite data inspect")
    dataset = PreparedDataset(arguments.dataset)
    if arguments.document is None:
        report = inspect(dataset)
        _print_inspection(report)
    else:
        report = document_report(dataset, arguments.split, arguments.document)
        print(
            f"{_place(report)}: {len(report['tokens']):,} tokens, {report['bytes']:,} bytes\n{report['text']}"
        )
    if arguments.json:
        print(json.dumps(report), flush=True)
    return ExitCode.DONE


def _print_inspection(report: dict[str, Any]) -> None:
    print(
        f"{report['path']}: vocabulary {report['vocab_size']:,}, end-of-document token {report['eod_id']}, "
        f"tokenizer {report['tokenizer_fingerprint'][:12]}"
    )
    _print_splits(report["splits"])
    for split, totals in report["splits"].items():
        if not totals["documents"]:
            continue
        print(
            f"\n{split}: longest document {totals['longest_document']} with "
            f"{totals['longest_document_tokens']:,} tokens; documents by tokens:"
        )
        most = max(totals["documents_shorter_than"].values())
        for limit, count in totals["documents_shorter_than"].items():
            print(
                f"{limit // 2:>12,} … {limit - 1:<12,} {count:>12,} {'▇' * max(1, round(40 * count / most))}"
            )


def _who(argv: list[str]) -> int:
    from megalite.data.dataset import load_datasets
    from megalite.data.inspect import documents_of_samples

    arguments = parse(WhoArguments, argv, prog="megalite data who")
    if arguments.step < 1:
        raise UserError(f"--step={arguments.step} must be at least 1: steps are numbered as in metrics.jsonl")
    datasets, train, seed = _run_of(arguments)
    blend = load_datasets(datasets, seq_length=train.seq_length, seed=seed)
    first = train.samples_before(arguments.step - 1)
    entries = documents_of_samples(blend, first, train.batch_size_at(arguments.step - 1))
    last = first + len(entries) - 1
    print(f"step {arguments.step}: samples {first:,} to {last:,}, {train.seq_length} tokens each")
    for entry in entries:
        print(f"sample {entry['sample']:,}: {entry['dataset']} from token {entry['start']:,}")
        for document in entry["documents"]:
            print(f"  {_place(document)}")
    if arguments.json:
        print(json.dumps({"step": arguments.step, "samples": entries}), flush=True)
    return ExitCode.DONE


def _run_of(arguments: WhoArguments) -> tuple[Sequence[DatasetSpec], TrainConfig, int]:
    """(datasets, batch geometry, seed) of a run directory, a configuration, or a dataset folder."""
    path = Path(arguments.what)
    file = path / "config.toml" if (path / "config.toml").exists() else path
    if file.suffix == ".toml":
        config = config_from_file(file)
        return config.data.datasets, config.train, config.data.seed
    size = arguments.global_batch_size
    train = TrainConfig(seq_length=arguments.seq_length, micro_batch_size=size, global_batch_size=size)
    return (DatasetSpec(path=arguments.what),), train, arguments.seed


def _place(document: dict[str, Any]) -> str:
    """Where a document is and came from, on one line."""
    unit = next(unit for unit in POSITION_UNITS if unit in document)
    return (
        f"{document['split']} document {document['document']} from {document['source']}: {document['file']} "
        f"{unit} {document[unit]:,}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
