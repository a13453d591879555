"""The stages of a preparation: scan, drop duplicates, split, train a tokenizer, encode, assemble."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

import megalite
from megalite.data.assemble import split_totals, write_files_list, write_splits
from megalite.data.dataset import FORMAT_VERSION, INFO_FILE
from megalite.data.dedup import DedupResult, SplitRule, dedup_result, find_duplicates
from megalite.data.documents import ReadOptions
from megalite.data.encode import (
    EncodeResult,
    EncodeTask,
    UnitTask,
    encode_result,
    encode_unit,
)
from megalite.data.files import read_json, write_json
from megalite.data.plan import Unit, plan_units, unit_bytes
from megalite.data.scan import ScanResult, ScanTask, scan_result, scan_unit
from megalite.data.sources import Source, SourceFile, list_files, parse_sources
from megalite.data.tokenize import EOD_TOKEN, FILE_NAME, Tokenizer
from megalite.data.vocabulary import SampleTask, TrainTask, sample_unit, train_tokenizer
from megalite.data.workers import run_all, run_apart
from megalite.errors import UserError

MIN_DOCUMENT_LIMIT = 1024
"""Smallest max_document_bytes: shorter pieces would be mostly boundaries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What to prepare. Fields after `workers` do not change the result."""

    inputs: tuple[str, ...]
    output: str
    text_key: str = "text"
    tokenizer: str = ""
    vocab_size: int = 4096
    eod_token: str = EOD_TOKEN
    validation_bytes: int = 500_000
    validation_max_document_bytes: int = 100_000
    max_document_bytes: int = 1 << 20
    tokenizer_sample_bytes: int = 32_000_000
    seed: int = 1234
    on_error: Literal["stop", "skip"] = "stop"
    workers: int = 0
    overwrite: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        for name in ("validation_bytes", "validation_max_document_bytes", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)} must not be negative")
        if not MIN_DOCUMENT_LIMIT <= self.max_document_bytes <= 1 << 30:
            raise UserError(
                f"--max-document-bytes={self.max_document_bytes} must be in [{MIN_DOCUMENT_LIMIT}, 2**30]"
            )
        if self.tokenizer_sample_bytes < 1:
            raise UserError(f"--tokenizer-sample-bytes={self.tokenizer_sample_bytes} must be at least 1")

    def that_matter(self) -> dict[str, Any]:
        """The arguments that determine the result, for dataset.json and for comparison on a restart."""
        values = dataclasses.asdict(self)
        for name in ("output", "workers", "overwrite", "restart"):
            del values[name]
        values["inputs"] = list(self.inputs)
        return values


class Progress(Protocol):
    """What the stages report to."""

    def stage(self, name: str, total: int) -> None:
        """A stage begins; `total` is what `advance` will add up to."""

    def advance(self, amount: int) -> None:
        """More of the stage is done."""

    def note(self, message: str) -> None:
        """Something worth a line."""


class Preparation:
    """The stages of one preparation, each of which first takes over what an earlier run finished."""

    def __init__(
        self, options: PrepareOptions, work: Path, progress: Progress, tokenizer: Tokenizer | None
    ) -> None:
        self.options = options
        self.work = work
        self.progress = progress
        self.given_tokenizer = tokenizer
        self.workers = options.workers or os.cpu_count() or 1
        self.read_options = ReadOptions(
            text_key=options.text_key, max_document_bytes=options.max_document_bytes
        )
        self.sources: list[Source] = parse_sources(options.inputs)
        self.files: list[SourceFile]
        self.files, self.ignored = list_files(self.sources)
        self.units: list[Unit] = []
        self.folders = {name: work / name for name in ("scan", "sample", "encode", "dataset")}

    def all_stages(self) -> dict[str, Any]:
        """Run what is not done yet; returns the contents of dataset.json."""
        began = time.perf_counter()
        self._check_same_arguments()
        for folder in self.folders.values():
            folder.mkdir(exist_ok=True)
        self.units = plan_units(self.files, self.read_options)
        scanned = self._scan()
        dedup = self._deduplicate(scanned)
        base_tasks = self._base_tasks(scanned, dedup)
        tokenizer = self._tokenizer(base_tasks, dedup)
        encoded = self._encode(base_tasks, tokenizer)
        info = self._describe(scanned, dedup, encoded, tokenizer, time.perf_counter() - began)
        self._assemble(info, tokenizer)
        return info

    def _check_same_arguments(self) -> None:
        """Refuse to mix the outcomes of different arguments in one work folder."""
        arguments = self.options.that_matter()
        arguments["tokenizers_version"] = _versions()["tokenizers"]
        if self.given_tokenizer is not None:
            arguments["tokenizer_fingerprint"] = self.given_tokenizer.fingerprint
        state = self.work / "state.json"
        before = read_json(state)
        if before is None:
            write_json(state, arguments)
            return
        for name in sorted(arguments.keys() | before.keys()):
            if arguments.get(name) != before.get(name):
                raise UserError(
                    f"{self.work} was begun with {name}={before.get(name)!r}, now it is "
                    f"{arguments.get(name)!r}: repeat that command to go on, or add --restart to begin anew"
                )

    def _scan(self) -> list[ScanResult]:
        results = {u.number: r for u in self.units if (r := scan_result(self.folders["scan"], u)) is not None}
        self.progress.stage("read and hash", sum(unit.bytes for unit in self.units))
        self.progress.advance(sum(self.units[number].bytes for number in results))
        tasks = [
            ScanTask(unit, str(self.folders["scan"]), self.read_options, self.options.on_error == "skip")
            for unit in self.units
            if unit.number not in results
        ]

        def done(task: ScanTask, result: ScanResult) -> None:
            results[task.unit.number] = result
            for message in result.messages:
                self.progress.note(f"skipped: {message}")
            self.progress.advance(task.unit.bytes)

        run_all(scan_unit, tasks, workers=min(self.workers, len(tasks)), on_done=done)
        ordered = [results[unit.number] for unit in self.units]
        if not any(result.documents for result in ordered):
            raise UserError(
                f"no text in {', '.join(self.options.inputs)}: every document is empty or was skipped"
            )
        return ordered

    def _deduplicate(self, scanned: Sequence[ScanResult]) -> DedupResult:
        inputs = "-".join((str(len(self.units)), _digest(unit.signature for unit in self.units)))
        finished = dedup_result(self.folders["scan"])
        if finished is not None:
            if finished.inputs != inputs:
                raise UserError(
                    f"the input changed since {self.work} was begun: restore it to go on, or add --restart "
                    "to begin anew"
                )
            return finished
        rule = SplitRule(self.options.validation_bytes, self.options.validation_max_document_bytes)
        with self._share("find duplicates") as report:
            documents = [result.documents for result in scanned]
            return find_duplicates(self.folders["scan"], documents, rule, inputs=inputs, on_progress=report)

    def _base_tasks(self, scanned: Sequence[ScanResult], dedup: DedupResult) -> list[UnitTask]:
        first = np.cumsum([0] + [result.documents for result in scanned])
        return [
            UnitTask(
                unit=unit,
                scan_folder=str(self.folders["scan"]),
                first_document=int(first[unit.number]),
                validation_threshold=dedup.validation_threshold,
                validation_max_document_bytes=self.options.validation_max_document_bytes,
                options=self.read_options,
                skip_bad=self.options.on_error == "skip",
            )
            for unit in self.units
        ]

    def _tokenizer(self, base_tasks: Sequence[UnitTask], dedup: DedupResult) -> Tokenizer:
        path = self.work / FILE_NAME
        if not path.exists():
            if self.given_tokenizer is not None:
                self.given_tokenizer.save(path)
            else:
                self._train_tokenizer(base_tasks, dedup, path)
        return Tokenizer.load(path, eod_token=self.options.eod_token)

    def _train_tokenizer(self, base_tasks: Sequence[UnitTask], dedup: DedupResult, path: Path) -> None:
        share = min(1.0, self.options.tokenizer_sample_bytes / (dedup.bytes - dedup.validation_bytes))
        threshold = 2**64 if share == 1.0 else int(share * 2**64)
        folder = self.folders["sample"]
        tasks = [SampleTask(task, str(folder), threshold, self.options.seed) for task in base_tasks]
        waiting = [task for task in tasks if not (folder / f"{task.base.unit.number:06d}.jsonl").exists()]
        self.progress.stage("sample for the tokenizer", sum(task.base.unit.bytes for task in waiting))

        def done(task: SampleTask, _: int) -> None:
            self.progress.advance(task.base.unit.bytes)

        run_all(sample_unit, waiting, workers=min(self.workers, len(waiting)), on_done=done)
        self.progress.stage("train the tokenizer", 1)
        training = TrainTask(
            folder=str(folder),
            path=str(path),
            limit=2 * self.options.tokenizer_sample_bytes,
            vocab_size=self.options.vocab_size,
            eod_token=self.options.eod_token,
        )
        # Training takes several times the sample's size, which the allocator would keep in this process.
        if self.workers > 1:
            run_apart(train_tokenizer, training)
        else:
            train_tokenizer(training)
        self.progress.advance(1)

    def _encode(self, base_tasks: Sequence[UnitTask], tokenizer: Tokenizer) -> list[EncodeResult]:
        folder = self.folders["encode"]
        results = {u.number: r for u in self.units if (r := encode_result(folder, u.number)) is not None}
        self.progress.stage("encode", sum(unit.bytes for unit in self.units))
        self.progress.advance(sum(self.units[number].bytes for number in results))
        tasks = [
            EncodeTask(task, str(folder), str(self.work / FILE_NAME), tokenizer.eod_token)
            for task in base_tasks
            if task.unit.number not in results
        ]

        def done(task: EncodeTask, result: EncodeResult) -> None:
            results[task.base.unit.number] = result
            self.progress.advance(task.base.unit.bytes)

        tasks.sort(key=lambda task: -task.base.unit.bytes)  # files that cannot be divided first: no long tail
        run_all(encode_unit, tasks, workers=min(self.workers, len(tasks)), on_done=done)
        return [results[unit.number] for unit in self.units]

    def _assemble(self, info: dict[str, Any], tokenizer: Tokenizer) -> None:
        folder = self.folders["dataset"]
        documents = {split: counts["documents"] for split, counts in info["splits"].items()}
        with self._share("assemble") as report:
            write_splits(
                self.folders["encode"],
                len(self.units),
                folder,
                vocab_size=tokenizer.vocab_size,
                documents=documents,
                on_progress=report,
            )
        write_files_list(folder, self.files, self.sources)
        tokenizer.save(folder)
        write_json(folder / INFO_FILE, info)

    def _describe(
        self,
        scanned: Sequence[ScanResult],
        dedup: DedupResult,
        encoded: Sequence[EncodeResult],
        tokenizer: Tokenizer,
        seconds: float,
    ) -> dict[str, Any]:
        text_bytes = sum(result.text_bytes for result in encoded)
        busy = sum(result.busy_s for result in encoded)
        scan_busy = sum(result.busy_s for result in scanned)
        return {
            "format": "megalite-dataset",
            "version": FORMAT_VERSION,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.eod_token,
            "sources": [source.name for source in self.sources],
            "splits": split_totals(encoded, self.sources),
            "split_rule": {
                "rule": "validation if split_hash < threshold and bytes <= max_document_bytes; split_hash is "
                "bytes 8 to 15, little endian, of the 16-byte BLAKE2b hash of the document's UTF-8 text",
                "threshold": dedup.validation_threshold,
                "max_document_bytes": self.options.validation_max_document_bytes,
            },
            "duplicates": {"documents": dedup.duplicate_documents, "bytes": dedup.duplicate_bytes},
            "empty_documents": sum(result.empty for result in scanned),
            "skipped_inputs": sum(result.skipped for result in scanned),
            "ignored_files": self.ignored,
            "arguments": self.options.that_matter(),
            "versions": _versions(),
            "speed": {
                "encode_mb_per_s_per_core": round(text_bytes / 1e6 / max(busy, 1e-9), 2),
                "scan_mb_per_s_per_core": round(
                    sum(result.bytes for result in scanned) / 1e6 / max(scan_busy, 1e-9), 2
                ),
                "tokenizer_share": round(sum(result.tokenizer_s for result in encoded) / max(busy, 1e-9), 3),
                "workers": min(self.workers, len(self.units)),
                "unit_bytes": unit_bytes(sum(file.size for file in self.files)),
                "seconds": round(seconds, 3),
            },
        }

    @contextmanager
    def _share(self, name: str) -> Iterator[Callable[[float], None]]:
        """A stage that reports the share done, in thousandths."""
        self.progress.stage(name, 1000)
        reported = 0

        def report(share: float) -> None:
            nonlocal reported
            now = int(share * 1000)
            self.progress.advance(now - reported)
            reported = now

        yield report


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    import tokenizers

    return {
        "megalite": megalite.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
    }
