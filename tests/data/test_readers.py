"""Reading documents: every format gives the same texts, ranges meet, damage is named with its place."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import read_jsonl
from megalite.data.documents import CorruptInputError, Document, ReadOptions, Span
from megalite.data.plan import plan_units, read_unit, unit_bytes
from megalite.data.readers import cut_at_lines, read_span, text_pieces
from megalite.data.sources import SourceFile, list_files, parse_sources
from megalite.errors import UserError

TEXTS = ["first text\n", "zweiter Text: äöü €\n", "", "third 🙂 text", "line\nline\n"]
LINES = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)]
WHOLE = Span(0, 0, 1 << 40)


def write_format(folder: Path, kind: str, texts: list[str], lines: list[str] | None = None) -> Path:
    """A file of this kind that holds these texts."""
    path = folder / f"texts.{kind}"
    data = "".join(LINES if lines is None else lines).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(data))
    elif kind == "jsonl.zst":  # two frames, as parallel compressors write them
        half = len(data) // 2
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(data[:half]) + compressor.compress(data[half:]))
    else:
        path.write_bytes(data)
    return path


def source_file(path: Path) -> SourceFile:
    files, _ = list_files(parse_sources([str(path)]))
    return files[0]


def fail(error: CorruptInputError) -> None:
    raise error


def read(path: Path, span: Span = WHOLE, **options: object) -> list[Document]:
    return list(read_span(source_file(path), span, ReadOptions(**options), fail))  # type: ignore[arg-type]


def read_skipping(path: Path) -> tuple[list[str], list[str]]:
    """Texts, and the messages of what was skipped."""
    messages: list[str] = []
    documents = read_span(source_file(path), WHOLE, ReadOptions(), lambda e: messages.append(str(e)))
    return [document.data.decode() for document in documents], messages


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path: Path, kind: str):
    documents = read(write_format(tmp_path, kind, TEXTS))
    assert [document.data.decode() for document in documents] == TEXTS
    positions = [document.position for document in documents]
    if kind == "jsonl":
        assert positions == [len("".join(LINES[:i]).encode()) for i in range(len(LINES))]
    else:
        assert positions == ([0, 1, 2, 3, 4] if kind == "parquet" else [1, 2, 3, 4, 5])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranges_of_a_jsonl_file_meet(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = write_format(tmp_path_factory.mktemp("r"), "jsonl", TEXTS, [*LINES, "\n", LINES[0].rstrip("\n")])
    size = path.stat().st_size
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=6)))
    edges = [0, *cuts, size]
    parts = [d for a, b in itertools.pairwise(edges) for d in read(path, Span(0, a, b))]
    assert parts == read(path)
    assert [part.data.decode() for part in parts] == [*TEXTS, TEXTS[0]]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab\n€🙂", max_size=200), limit=st.integers(4, 40))
def test_long_texts_are_cut_at_lines(tmp_path_factory: pytest.TempPathFactory, text: str, limit: int):
    data = text.encode()
    pieces = list(cut_at_lines(data, limit))
    assert b"".join(pieces) == data
    assert all(len(piece) < 2 * limit for piece in pieces)
    for piece in pieces:
        piece.decode()  # no character is cut
    edges = {0, len(data)}
    for nominal in range(limit, len(data), limit):
        ends = [
            end for end in range(nominal, min(nominal + limit, len(data) + 1)) if data[end - 1] == ord("\n")
        ]
        starts = [at for at in range(nominal, len(data)) if data[at] & 0xC0 != 0x80]
        edges.add((ends or starts or [len(data)])[0])
    cuts = sorted(edges)
    assert [piece for piece in pieces if piece] == [data[a:b] for a, b in itertools.pairwise(cuts)]
    # The same cuts from the file, however its pieces are divided among spans.
    path = tmp_path_factory.mktemp("c") / "a.txt"
    path.write_bytes(data)
    count = text_pieces(len(data), limit)
    options = ReadOptions(max_document_bytes=limit)
    one_by_one = [
        d for i in range(count) for d in read_span(source_file(path), Span(0, i, i + 1), options, fail)
    ]
    assert [d.data for d in one_by_one] == pieces
    assert [d.position for d in one_by_one] == [sum(map(len, pieces[:i])) for i in range(len(pieces))]


def test_long_json_texts_are_cut_too(tmp_path: Path):
    text = "one line\n" * 10
    path = write_format(tmp_path, "jsonl", [], [json.dumps({"text": text}) + "\n"])
    documents = read(path, max_document_bytes=20)
    assert [d.data for d in documents] == list(cut_at_lines(text.encode(), 20))
    assert {d.position for d in documents} == {0}


CORRUPT_LINES = {
    "torn": ('{"text": "abc', r"line 3.*not JSON .*the line has no end, the file may be torn"),
    "not json": ("nonsense\n", r"line 3.*not JSON"),
    "not an object": ("[1]\n", r"line 3.*a JSON list, expected an object"),
    "no key": ('{"txt": 1, "b": 2}\n', r"line 3.*no key 'text' \(there are 'txt', 'b'\): use --text-key"),
    "not text": ('{"text": 5}\n', r"line 3.*'text' is int, expected text"),
    "surrogate": ('{"text": "\\ud800"}\n', r"line 3.*not valid Unicode \(character 0"),
    "deep": ("[" * 100_000 + "\n", r"line 3.*not JSON"),
}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("name", CORRUPT_LINES)
def test_corrupt_lines(tmp_path: Path, kind: str, name: str):
    line, message = CORRUPT_LINES[name]
    path = write_format(tmp_path, kind, [], [*LINES[:2], line])
    with pytest.raises(CorruptInputError, match=rf"texts\.{kind} {message}"):
        read(path)
    texts, messages = read_skipping(path)
    assert texts == TEXTS[:2]
    assert len(messages) == 1


def test_skipping_goes_on_behind_a_bad_line(tmp_path: Path):
    path = write_format(tmp_path, "jsonl", [], [LINES[0], "bad\n", LINES[1]])
    texts, messages = read_skipping(path)
    assert texts == TEXTS[:2]
    assert messages == [
        f"{path} line 2 (byte {len(LINES[0])}): not JSON (Expecting value: line 1 column 1 (char 0))"
    ]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_bad_utf8_in_a_line(tmp_path: Path, kind: str):
    data = LINES[0].encode() + b'{"text": "\xff"}\n' + LINES[1].encode()
    path = tmp_path / f"texts.{kind}"
    path.write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    with pytest.raises(
        CorruptInputError, match=r"line 2.*: not UTF-8 text \(byte 10 of the line, invalid start"
    ):
        read(path)
    assert read_skipping(path)[0] == TEXTS[:2]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_an_overlong_line(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read_jsonl, "MAX_LINE_BYTES", 100_000)
    long = json.dumps({"text": "x" * 300_000}) + "\n"
    path = write_format(tmp_path, kind, [], [LINES[0], long, LINES[1]])
    with pytest.raises(CorruptInputError, match=r"line 2.*the line is longer than 100000 bytes"):
        read(path)
    texts, messages = read_skipping(path)
    assert texts == TEXTS[:2]
    assert len(messages) == 1


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("missing", [1, 5, 400])
def test_truncated_compressed_files(tmp_path: Path, kind: str, missing: int):
    import random

    noise = random.Random(1)
    lines = [json.dumps({"text": "".join(noise.choices("abcdefgh", k=200))}) + "\n" for _ in range(50)]
    path = write_format(tmp_path, kind, [], lines)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(CorruptInputError, match=rf"{kind} line \d+: truncated or damaged compressed file"):
        read(path)
    texts, messages = read_skipping(path)
    assert len(messages) >= 1
    assert texts == [json.loads(line)["text"] for line in lines[: len(texts)]]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_damaged_compressed_files(tmp_path: Path, kind: str):
    path = write_format(tmp_path, kind, [])
    path.write_bytes(b"not compressed at all")
    with pytest.raises(CorruptInputError, match="line 1: truncated or damaged compressed file"):
        read(path)


def test_bad_utf8_in_a_text_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(CorruptInputError, match=r"a\.txt line 3 \(byte 11\): not UTF-8 text \(byte 0xe9"):
        read(path)
    path.write_bytes(b"a" * 40 + b"\n" + b"b" * 40 + b"\n\xff" + b"c" * 40 + b"\n" + b"d" * 40)
    with pytest.raises(CorruptInputError, match=r"a\.txt line 3 \(byte 82\)"):
        read(path, max_document_bytes=30)


class TestParquet:
    def test_row_groups_are_divided(self, tmp_path: Path):
        path = write_format(tmp_path, "parquet", TEXTS)
        parts = [read(path, Span(0, i, i + 1)) for i in range(3)]
        assert [[d.position for d in part] for part in parts] == [[0, 1], [2, 3], [4]]

    def test_nulls_and_other_types(self, tmp_path: Path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["x", None, "y"]}), path)
        with pytest.raises(CorruptInputError, match=r"a\.parquet row 1: 'text' is null, expected text"):
            read(path)
        assert read_skipping(path)[0] == ["x", "y"]
        pq.write_table(pa.table({"text": [1, 2]}), path)
        with pytest.raises(CorruptInputError, match=r"a\.parquet row 0: 'text' is int, expected text"):
            read(path)

    def test_bad_utf8(self, tmp_path: Path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": pa.array([b"x", b"a\xff"], pa.binary())}), path)
        with pytest.raises(CorruptInputError, match=r"a\.parquet row 1: not UTF-8 text \(byte 1 of the cell"):
            read(path)

    def test_large_strings(self, tmp_path: Path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": pa.array(["x", "ü"], pa.large_string())}), path)
        assert [d.data.decode() for d in read(path)] == ["x", "ü"]

    def test_missing_column(self, tmp_path: Path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"content": ["x"]}), path)
        with pytest.raises(
            CorruptInputError, match=r"no column 'text' \(there are content\): use --text-key"
        ):
            read(path)
        assert [d.data for d in read(path, text_key="content")] == [b"x"]

    def test_broken_file(self, tmp_path: Path):
        path = write_format(tmp_path, "parquet", TEXTS)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CorruptInputError, match=r"texts\.parquet row 0: not a readable Parquet file"):
            read(path)
        good = write_format(tmp_path, "parquet", [f"text number {i} " * 50 for i in range(200)])
        data = bytearray(good.read_bytes())
        data[100:400] = bytes(300)
        good.write_bytes(bytes(data))
        with pytest.raises(CorruptInputError, match=r"texts\.parquet row \d+: not a readable Parquet file"):
            read(good)


class TestSources:
    def test_folders_are_walked_in_order(self, tmp_path: Path):
        for name in (
            "b.py",
            "a.md",
            "sub/c.txt",
            "sub/d.jsonl",
            "x.bin",
            ".hidden.txt",
            ".git/e.txt",
            "__pycache__/f.py",
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("text")
        files, ignored = list_files(parse_sources([str(tmp_path)]))
        assert [Path(f.path).relative_to(tmp_path).as_posix() for f in files] == [
            "a.md",
            "b.py",
            "sub/c.txt",
            "sub/d.jsonl",
        ]
        assert ignored == 1

    def test_names(self, tmp_path: Path):
        (tmp_path / "corpus.txt").write_text("text")
        (tmp_path / "odd=name.txt").write_text("text")
        sources = parse_sources(
            [str(tmp_path / "corpus.txt"), f"mine={tmp_path}", "stdlib", str(tmp_path / "odd=name.txt")]
        )
        assert [s.name for s in sources] == ["corpus", "mine", "stdlib", "odd=name"]
        with pytest.raises(UserError, match="two inputs are called 'a': name them apart with --source"):
            parse_sources(["a=x", "a=y"])
        with pytest.raises(UserError, match=r"no input: name files, folders, or .*stdlib"):
            parse_sources([])
        with pytest.raises(UserError, match="must look like NAME=PATH"):
            parse_sources(["=x"])

    def test_nothing_there(self, tmp_path: Path):
        with pytest.raises(
            UserError, match=r"nowhere does not exist \(built-in corpora: stdlib, torch, botocore"
        ):
            list_files(parse_sources([str(tmp_path / "nowhere")]))
        with pytest.raises(UserError, match="holds no text file: known types are"):
            list_files(parse_sources([str(tmp_path)]))

    def test_the_standard_library(self):
        files, ignored = list_files(parse_sources(["stdlib"]))
        assert ignored == 0
        assert sum(f.size for f in files) > 5_000_000
        assert all(f.path.endswith(".py") for f in files)
        assert not any(part in f.path for f in files for part in ("/test/", "/tests/", "site-packages"))

    def test_botocore_prose(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = tmp_path / "botocore" / "data" / "s3" / "2006"
        folder.mkdir(parents=True)
        (tmp_path / "botocore" / "__init__.py").touch()
        prose = (
            "<p>Returns a list of all <b>buckets</b>, owned by you &amp; nobody else, in the order of "
            "names.</p><p>More.</p>"
        )
        service = {"documentation": prose, "operations": {"X": {"documentation": "short"}}}
        with gzip.open(folder / "service-2.json.gz", "wt") as out:
            json.dump(service, out)
        monkeypatch.syspath_prepend(str(tmp_path))
        # Other libraries import the installed one.
        monkeypatch.delitem(sys.modules, "botocore", raising=False)
        files, _ = list_files(parse_sources(["botocore"]))
        documents = list(read_span(files[0], Span(0, 0, 1), ReadOptions(), fail))
        assert [d.data.decode() for d in documents] == [
            "Returns a list of all buckets, owned by you & nobody else, in the order of names.\nMore.\n"
        ]
        (folder / "service-2.json.gz").write_bytes(b"broken")
        with pytest.raises(CorruptInputError, match="not a readable service description"):
            list(read_span(files[0], Span(0, 0, 1), ReadOptions(), fail))

    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="'botocore' needs that package: pip install --no-deps botocore"):
            list_files(parse_sources(["botocore"]))


class TestPlan:
    def test_units_cover_everything_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("megalite.data.plan.SMALLEST_UNIT", 3000)
        (tmp_path / "big.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
        (tmp_path / "lines.jsonl").write_text(
            "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(2000))
        )
        for i in range(5):
            (tmp_path / f"s{i}.txt").write_text(f"small {i}")
        pq.write_table(
            pa.table({"text": [f"row {i}" for i in range(3000)]}), tmp_path / "z.parquet", row_group_size=300
        )
        files, _ = list_files(parse_sources([str(tmp_path)]))
        options = ReadOptions(max_document_bytes=1024)
        units = plan_units(files, options)
        assert [unit.number for unit in units] == list(range(len(units)))
        assert len(units) > 10
        divided = [d for unit in units for _, _, d in read_unit(unit, options, fail)]
        whole = [
            d
            for file in files
            for d in read_span(
                file,
                Span(0, 0, text_pieces(file.size, 1024) if file.kind == "text" else 1 << 40),
                options,
                fail,
            )
        ]
        assert divided == whole
        assert abs(sum(unit.bytes for unit in units) - sum(f.size for f in files)) < 100

    def test_unit_size(self):
        assert unit_bytes(0) == 1 << 20
        assert unit_bytes(1 << 30) == unit_bytes((1 << 30) + 999) == 8 << 20
        assert unit_bytes(1 << 42) == 64 << 20

    def test_a_changed_file(self, tmp_path: Path):
        path = tmp_path / "a.txt"
        path.write_text("before")
        units = plan_units([source_file(path)], ReadOptions())
        path.write_text("after it")
        with pytest.raises(
            UserError, match=r"a\.txt changed while it was being prepared: start over with --restart"
        ):
            list(read_unit(units[0], ReadOptions(), fail))
