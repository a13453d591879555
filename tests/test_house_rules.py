"""Rules that a reader relies on: sizes, no global state, no paths of somebody's machine."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.source import PACKAGES, ROOT, modules, parse

FUNCTION_LINES = 60
KERNEL_LINES = 120
FILE_LINES = 400
TEXT = {".cfg", ".cpp", ".cu", ".cuh", ".h", ".md", ".py", ".sh", ".toml", ".yaml", ".yml", ""}
FOLDERS = [".ci", "benchmarks", "csrc", "examples", "kernels", "megalite", "scripts", "tests"]


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in modules(package).values()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_functions_are_short():
    long = []
    for path in python_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > (KERNEL_LINES if is_kernel(node) else FUNCTION_LINES):
                    long.append(f"{name_of(path)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, f"at most {FUNCTION_LINES} lines a function, {KERNEL_LINES} a kernel"


def test_files_are_short():
    sizes = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = {name: lines for name, lines in sizes.items() if lines > FILE_LINES}
    assert not long, f"at most {FILE_LINES} lines a file: split by what a reader looks for"


def test_no_global_statement():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Global)
    ]
    assert not found, "state is passed, not kept in a module"


def test_every_package_folder_is_a_package():
    """A folder without __init__.py works from the checkout and is missing in the wheel."""
    missing = {name_of(path.parent) for path in python_files() if not (path.parent / "__init__.py").exists()}
    assert not missing


def test_no_machine_paths():
    folders = ["work", "farm", "root", "Users"]  # joined below, so that this file does not find itself
    needles = [f"/{folder}/" for folder in folders] + ["/tmp/" + "bash_jobs", "/tmp/" + "mega"]
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.name != ".git"]  # in a worktree that is a file
    found = []
    for path in files:
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                found += [f"{name_of(path)}:{number}" for needle in needles if needle in line]
    assert not found
