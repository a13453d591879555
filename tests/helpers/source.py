"""The checkout's own files, for tests that read code as data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"megalite": ROOT / "megalite", "megalite_kernels": ROOT / "kernels" / "megalite_kernels"}


class Import(NamedTuple):
    module: str
    """Dotted name of what is imported; for ``from a import b``, ``a.b`` (b may be a module or a name)."""
    line: int
    lazy: bool
    """Inside a function: it happens when that runs, not on import."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name → file of every module of one of the two packages."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import of a module, wherever it stands; those under ``if TYPE_CHECKING`` too."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (Import(f"{prefix}.{alias.name}", node.lineno, lazy) for alias in node.names)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))
