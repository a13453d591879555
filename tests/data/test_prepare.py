"""Preparing a dataset: what goes in comes out, once; restarts, refusals and failures lose nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megalite.data.dataset import SPLITS, PreparedDataset
from megalite.data.inspect import document_report, inspect
from megalite.data.prepare import prepare
from megalite.data.scan import content_hash
from megalite.data.stages import Preparation, PrepareOptions
from megalite.data.tokenize import Tokenizer
from megalite.errors import StorageError, UserError

CONTENT_FILES = (
    *(f"{split}.{part}" for split in SPLITS for part in ("bin", "idx", "documents.npy")),
    "tokenizer.json",
    "files.jsonl",
)
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "his",
    "he",
    "it",
    "with",
    "is",
    "for",
    "as",
    "had",
    "you",
    "not",
    "be",
    "her",
    "on",
    "at",
    "by",
    "which",
    "have",
    "or",
]


class Quiet:
    """Records what a preparation reports."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append(name)

    def advance(self, amount: int) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


def text(seed: int, words: int = 200) -> str:
    choice = random.Random(seed)
    lines = [" ".join(choice.choices(WORDS, k=10)) for _ in range(words // 10)]
    return f"document {seed}\n" + "\n".join(lines) + "\n"


def options(output: Path, *inputs: object, **fields: Any) -> PrepareOptions:
    defaults: dict[str, Any] = {"vocab_size": 300, "validation_bytes": 10_000, "workers": 1}
    return PrepareOptions(output=str(output), inputs=tuple(map(str, inputs)), **{**defaults, **fields})


def make(output: Path, *inputs: object, **fields: Any) -> PreparedDataset:
    prepare(options(output, *inputs, **fields), Quiet())
    return PreparedDataset(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT_FILES}


def texts_of(dataset: PreparedDataset) -> dict[str, list[str]]:
    return {
        split: [document_report(dataset, split, i)["text"] for i in range(dataset.split(split).documents)]
        for split in SPLITS
    }


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with every format, duplicates across formats, and empty documents; its distinct texts."""
    folder = tmp_path / "input"
    (folder / "sub").mkdir(parents=True)
    texts = [text(i) for i in range(120)]
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(texts[i])
    (folder / "empty.md").write_text("")
    (folder / "blank.py").write_text(" \n\n")
    lines = [json.dumps({"text": t}) + "\n" for t in [*texts[30:70], "", texts[35]]]
    (folder / "sub" / "a.jsonl").write_text("".join(lines))
    (folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[:5]).encode()))
    pq.write_table(pa.table({"text": texts[60:]}), folder / "sub" / "c.parquet", row_group_size=7)
    return folder, texts


def test_what_goes_in_comes_out_once(tmp_path: Path, mixed: tuple[Path, list[str]]):
    folder, texts = mixed
    dataset = make(tmp_path / "out", folder)
    got = texts_of(dataset)
    assert sorted(got["train"] + got["validation"]) == sorted(texts)
    assert not set(got["train"]) & set(got["validation"])
    duplicates = [*texts[30:40], texts[35], *texts[30:35], *texts[60:70]]
    assert dataset.info["duplicates"] == {
        "documents": len(duplicates),
        "bytes": sum(map(len, duplicates)),
    }
    assert dataset.info["empty_documents"] == 3
    for split in SPLITS:
        totals = dataset.split(split)
        assert totals.bytes == sum(len(t.encode()) for t in got[split])
        assert totals.tokens == dataset.reader(split).tokens
        for i in range(totals.documents):
            assert dataset.reader(split).document(i)[-1] == dataset.eod_id
            assert dataset.eod_id not in dataset.reader(split).document(i)[:-1]
    assert not (tmp_path / "out.preparing").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*CONTENT_FILES, "dataset.json"])


def test_documents_keep_the_order_of_their_files(tmp_path: Path, mixed: tuple[Path, list[str]]):
    folder, texts = mixed
    train = texts_of(make(tmp_path / "out", folder))["train"]
    assert train == [t for t in texts if t in set(train)]


def test_every_document_knows_where_it_came_from(tmp_path: Path, mixed: tuple[Path, list[str]]):
    dataset = make(tmp_path / "out", f"mine={mixed[0]}")
    found = set()
    for split in SPLITS:
        for i in range(dataset.split(split).documents):
            report = document_report(dataset, split, i)
            path = Path(report["file"])
            if path.suffix == ".txt":
                original = path.read_bytes()[report["byte"] :].decode()
            elif path.suffix == ".jsonl":
                original = json.loads(path.read_bytes()[report["byte"] :].splitlines()[0])["text"]
            else:
                original = pq.read_table(path)["text"][report["row"]].as_py()
            assert (original, len(original.encode()), "mine") == (
                report["text"],
                report["bytes"],
                report["source"],
            )
            found.add(path.suffix)
    assert found == {".txt", ".jsonl", ".parquet"}


def test_the_split_is_a_pure_function_of_content(tmp_path: Path, mixed: tuple[Path, list[str]]):
    folder, _ = mixed
    dataset = make(tmp_path / "out", folder)
    rule, got = dataset.info["split_rule"], texts_of(dataset)
    for split in SPLITS:
        for content in got[split]:
            data = content.encode()
            held_out = content_hash(data)[1] < rule["threshold"] and len(data) <= rule["max_document_bytes"]
            assert held_out == (split == "validation")
    total = dataset.split("train").bytes + dataset.split("validation").bytes
    assert 0.02 * total < dataset.split("validation").bytes <= 0.05 * total
    again = make(tmp_path / "again", folder / "sub", folder / "00.txt", validation_bytes=10_000)
    assert not set(texts_of(again)["train"]) & set(got["validation"]), "a smaller corpus, a higher threshold"


def test_long_documents_are_not_held_out(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.txt").write_text(text(i, words=400 if i % 2 else 100))
    limit = len(text(0, words=100)) + 100
    dataset = make(tmp_path / "out", tmp_path / "in", validation_max_document_bytes=limit)
    assert dataset.split("validation").documents
    assert max(len(t) for t in texts_of(dataset)["validation"]) <= limit


def test_no_validation_and_impossible_validation(tmp_path: Path):
    (tmp_path / "one.txt").write_text(text(1, words=2000))
    with pytest.raises(UserError, match=r"no document can be held out .* smaller --max-document-bytes"):
        make(tmp_path / "out", tmp_path / "one.txt")
    assert (
        make(tmp_path / "out", tmp_path / "one.txt", validation_bytes=0, restart=True)
        .split("train")
        .documents
        == 1
    )
    cut = make(tmp_path / "cut", tmp_path / "one.txt", max_document_bytes=1024)
    assert cut.split("validation").documents >= 1
    whole = texts_of(cut)
    assert sum(map(len, whole["train"] + whole["validation"])) == len(text(1, words=2000))


def test_workers_change_nothing(
    tmp_path: Path, mixed: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megalite.data.plan.SMALLEST_UNIT", 10_000)
    alone = make(tmp_path / "alone", mixed[0])
    together = make(tmp_path / "together", mixed[0], workers=2)
    assert alone.info["speed"]["workers"] == 1
    assert together.info["speed"]["workers"] == 2
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_division_into_units_and_runs_changes_nothing(
    tmp_path: Path, mixed: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    """Tiny units, sorted runs, hash partitions, batches and chunks: every seam of the pipeline."""
    make(tmp_path / "whole", mixed[0])
    for name, value in (
        ("plan.SMALLEST_UNIT", 3_000),
        ("scan.RUN", 4),
        ("dedup.RUN", 4),
        ("dedup.PARTITION", 16),
        ("encode.BATCH_BYTES", 2_000),
        ("encode.RECORDS_READ", 3),
        ("indexed.CHUNK", 5),
    ):
        monkeypatch.setattr(f"megalite.data.{name}", value)
    make(tmp_path / "divided", mixed[0])
    assert contents(tmp_path / "whole") == contents(tmp_path / "divided")


def test_sources_are_counted_apart(tmp_path: Path):
    for name, seeds in (("a", range(30)), ("b", range(20, 60))):
        (tmp_path / name).mkdir()
        for i in seeds:
            (tmp_path / name / f"{i:02d}.txt").write_text(text(i))
    dataset = make(
        tmp_path / "out", f"first={tmp_path / 'a'}", f"second={tmp_path / 'b'}", validation_bytes=5000
    )
    assert dataset.sources == ["first", "second"]
    for split in SPLITS:
        sources = dataset.documents(split)["source"]
        per_source = [dataset.split_of_source(split, name) for name in dataset.sources]
        assert [s.documents for s in per_source] == np.bincount(sources, minlength=2).tolist()
        assert sum(s.tokens for s in per_source) == dataset.split(split).tokens
    documents = [sum(dataset.split_of_source(s, n).documents for s in SPLITS) for n in dataset.sources]
    assert documents == [30, 30], "a repeated document counts for the source that comes first"


def test_a_given_tokenizer(tmp_path: Path, mixed: tuple[Path, list[str]]):
    tokenizer = Tokenizer.train([text(i) for i in range(20)], vocab_size=280)
    tokenizer.save(tmp_path)
    dataset = make(tmp_path / "out", mixed[0], tokenizer=str(tmp_path))
    assert dataset.tokenizer_fingerprint == tokenizer.fingerprint == dataset.tokenizer().fingerprint
    assert dataset.reader("train").document(0).tolist()[:-1] == tokenizer.encode(
        texts_of(dataset)["train"][0]
    )
    with pytest.raises(UserError, match=r"tokenizer .*nowhere does not exist: give a tokenizer.json"):
        make(tmp_path / "other", mixed[0], tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "other.preparing").exists()
    (tmp_path / "out" / "tokenizer.json").write_text(Tokenizer.train([text(1)], vocab_size=260).definition)
    with pytest.raises(UserError, match=r"fingerprint .* but the data was encoded with"):
        dataset.tokenizer()


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    import tokenizers

    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)} | {"?": 70_000}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = [json.dumps({"text": f"w{i} w{69_999 - i}"}) + "\n" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    dataset = make(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=str(tmp_path), validation_bytes=0)
    assert dataset.reader("train").dtype == np.dtype("<i4")
    assert dataset.reader("train").document(3).tolist() == [3, 69_996, 70_001]
    assert (dataset.vocab_size, dataset.eod_id) == (70_002, 70_001)


def test_the_tokenizer_sees_training_text_only_and_little_of_it(
    tmp_path: Path, mixed: tuple[Path, list[str]]
):
    """The sample is chosen by content and seed, holds no validation text, and keeps to its size."""
    seen: list[list[str]] = []
    for seed in (1, 1, 2):
        output = tmp_path / f"out{len(seen)}"
        work = tmp_path / f"out{len(seen)}.preparing"
        work.mkdir()
        chosen = options(output, mixed[0], tokenizer_sample_bytes=40_000, seed=seed)
        preparation = Preparation(chosen, work, Quiet(), None)
        info = preparation.all_stages()
        files = sorted((work / "sample").glob("*.jsonl"))
        seen.append([json.loads(line) for file in files for line in file.read_text().splitlines()])
        assert 20_000 < sum(map(len, seen[-1])) < 60_000
        threshold = info["split_rule"]["threshold"]
        assert all(content_hash(t.encode())[1] >= threshold for t in seen[-1])
    assert seen[0] == seen[1] != seen[2]


def test_refusing_to_overwrite(tmp_path: Path, mixed: tuple[Path, list[str]]):
    make(tmp_path / "out", mixed[0])
    before = contents(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out is already a prepared dataset: choose another --output, or --overwrite"
    ):
        make(tmp_path / "out", mixed[0])
    assert contents(tmp_path / "out") == before
    (mixed[0] / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        make(tmp_path / "out", mixed[0], overwrite=True)
    assert contents(tmp_path / "out") == before, "a replacement that fails leaves the old dataset"
    (mixed[0] / "bad.txt").write_text(text(999))
    make(tmp_path / "out", mixed[0], overwrite=True)
    assert contents(tmp_path / "out") != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input", "out"]


def test_other_folders_are_never_replaced(tmp_path: Path, mixed: tuple[Path, list[str]]):
    for overwrite in (False, True):
        with pytest.raises(UserError, match="input exists and is not a prepared dataset: choose another"):
            make(mixed[0], mixed[0], overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", mixed[0])


def test_output_below_a_file(tmp_path: Path, mixed: tuple[Path, list[str]]):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(StorageError, match="file is a file, so nothing can be written below it"):
            make(output, mixed[0])


def test_nothing_to_prepare(tmp_path: Path):
    (tmp_path / "blank.txt").write_text("  \n")
    with pytest.raises(UserError, match=r"no text in .*blank\.txt: every document is empty or was skipped"):
        make(tmp_path / "out", tmp_path / "blank.txt")


def test_impossible_options(tmp_path: Path):
    for fields, message in (
        ({"validation_bytes": -1}, "--validation-bytes=-1 must not be negative"),
        ({"max_document_bytes": 1000}, r"--max-document-bytes=1000 must be in \[1024, 2\*\*30\]"),
        ({"tokenizer_sample_bytes": 0}, "--tokenizer-sample-bytes=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            options(tmp_path / "out", tmp_path, **fields)
    with pytest.raises(UserError, match=r"--output / has no name"):
        prepare(options(Path("/"), tmp_path), Quiet())


class TestInterrupted:
    def test_other_arguments_are_refused(self, tmp_path: Path, mixed: tuple[Path, list[str]]):
        (mixed[0] / "bad.txt").write_bytes(b"\xff")
        with pytest.raises(UserError, match="not UTF-8"):
            make(tmp_path / "out", mixed[0])
        with pytest.raises(UserError, match=r"begun with vocab_size=300, now it is 301: .* or add --restart"):
            make(tmp_path / "out", mixed[0], vocab_size=301)
        (mixed[0] / "bad.txt").unlink()
        assert make(tmp_path / "out", mixed[0], vocab_size=301, restart=True).vocab_size == 301

    def test_a_second_process_is_refused(self, tmp_path: Path, mixed: tuple[Path, list[str]]):
        import fcntl

        (tmp_path / "out.preparing").mkdir()
        with open(tmp_path / "out.preparing" / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match=r"another process is preparing into .*out\.preparing"):
                make(tmp_path / "out", mixed[0])

    def test_mended_input_keeps_what_was_read(
        self, tmp_path: Path, mixed: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("megalite.data.plan.SMALLEST_UNIT", 20_000)
        bad = mixed[0] / "sub" / "bad.txt"
        bad.write_bytes(b"good\n" * 30 + b"\xff")
        with pytest.raises(UserError, match=r"bad\.txt line 31 \(byte 150\): not UTF-8"):
            make(tmp_path / "out", mixed[0])
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.preparing" / "scan").glob("*.json")}
        assert kept
        bad.write_bytes(b"good\n" * 30 + b"x")
        chosen = options(tmp_path / "out", mixed[0])
        preparation = Preparation(chosen, tmp_path / "out.preparing", Quiet(), None)
        preparation.all_stages()
        assert {p: p.stat().st_mtime_ns for p in kept} == kept
        assert make(tmp_path / "out", mixed[0]).split("train").documents > 100

    def test_input_that_changes_after_the_split(self, tmp_path: Path, mixed: tuple[Path, list[str]]):
        work = tmp_path / "out.preparing"
        work.mkdir()
        Preparation(options(tmp_path / "out", mixed[0]), work, Quiet(), None).all_stages()
        (mixed[0] / "00.txt").write_text(text(0) + "more")
        with pytest.raises(UserError, match=r"the input changed since .* was begun: restore it .* --restart"):
            make(tmp_path / "out", mixed[0])

    def test_input_that_changes_unseen(self, tmp_path: Path, mixed: tuple[Path, list[str]]):
        """Same size and time, other content: found when the text is hashed again."""
        work = tmp_path / "out.preparing"
        work.mkdir()
        Preparation(options(tmp_path / "out", mixed[0]), work, Quiet(), None).all_stages()
        for done in (work / "encode").glob("*.json"):
            done.unlink()
        path = mixed[0] / "00.txt"
        status = path.stat()
        path.write_text(text(0)[:-2] + "!\n")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(UserError, match=r"00.txt changed while it was being prepared: start over"):
            make(tmp_path / "out", mixed[0])

    @pytest.mark.parametrize("moment", ["before the rename", "after the rename", "while cleaning up"])
    def test_killed_while_publishing(
        self, tmp_path: Path, mixed: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, moment: str
    ):
        make(tmp_path / "expected", mixed[0])
        make(tmp_path / "out", mixed[0] / "sub")  # an older dataset that is being replaced
        victim = {
            "before the rename": "megalite.data.prepare.os.rename",
            "after the rename": "megalite.data.prepare.fsync_folder",
            "while cleaning up": "megalite.data.prepare._clean_up",
        }[moment]

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(victim, killed)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "out", mixed[0], overwrite=True)
        make(tmp_path / "out", mixed[0], overwrite=True)
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "input", "out"]


class TestSkipping:
    def test_unreadable_input_is_counted_and_named(self, tmp_path: Path, mixed: tuple[Path, list[str]]):
        folder, texts = mixed
        (folder / "bad.txt").write_bytes(b"\xff")
        with open(folder / "sub" / "a.jsonl", "a") as lines:
            lines.write('{"text": "torn')
        with pytest.raises(UserError, match=r"bad\.txt line 1 \(byte 0\)"):
            make(tmp_path / "out", folder)
        progress = Quiet()
        prepare(options(tmp_path / "skipped", folder, on_error="skip"), progress)
        dataset = PreparedDataset(tmp_path / "skipped")
        assert dataset.info["skipped_inputs"] == 2
        assert [n.split("/")[-1].split(":")[0] for n in progress.notes] == [
            "bad.txt line 1 (byte 0)",
            f"a.jsonl line 43 (byte {(folder / 'sub' / 'a.jsonl').read_bytes().rindex(b'{')})",
        ]
        got = texts_of(dataset)
        assert sorted(got["train"] + got["validation"]) == sorted(texts)


def test_inspection(tmp_path: Path, mixed: tuple[Path, list[str]]):
    dataset = make(tmp_path / "out", mixed[0])
    report = inspect(dataset)
    lengths = [len(dataset.reader("train").document(i)) for i in range(dataset.split("train").documents)]
    train = report["splits"]["train"]
    assert train["longest_document_tokens"] == max(lengths)
    assert lengths[train["longest_document"]] == max(lengths)
    expected = {
        2**b: sum(1 for n in lengths if n.bit_length() == b) for b in {n.bit_length() for n in lengths}
    }
    assert train["documents_shorter_than"] == expected
    assert train["bytes_per_token"] == train["bytes"] / train["tokens"]
    with pytest.raises(UserError, match="has documents 0 to"):
        document_report(dataset, "train", 10**6)
