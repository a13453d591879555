"""Who may import whom, read from the source: an arrow in the wrong direction fails here, not in a review."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.helpers.source import ROOT, imports, modules, parse

COMPUTE = {"config", "config_model", "config_parallel", "parallel", "layers", "models", "optim", "data"}
# Part of megalite → the parts it may import besides itself; `errors` and the version are free for all.
MAY_IMPORT = {
    "": set(),
    "errors": set(),
    "config": {"config_model", "config_parallel", "config_checks"},
    "config_model": {"config_checks"},
    "config_parallel": {"config", "config_checks"},  # the model's shape, for type checkers only
    "config_checks": set(),
    "config_values": set(),
    "parallel": {"config", "config_parallel"},
    "layers": {"parallel", "config"},
    "models": {"layers", "parallel", "config"},
    "optim": {"parallel", "config"},
    "data": {"parallel", "config"},
    "interop": COMPUTE,
    "train": COMPUTE | {"interop", "config_values"},
    "cli": COMPUTE | {"train", "interop", "config_values"},
    "__main__": {"cli"},
}
MAY_IMPORT_KERNELS = {"parallel", "layers", "models", "optim", "train", "interop", "cli"}
STDLIB_ONLY = {
    "",
    "errors",
    "config",
    "config_model",
    "config_parallel",
    "config_checks",
    "config_values",
    "__main__",
}
# What moves data between ranks (a barrier does not); megalite.parallel.collectives is the only caller.
COLLECTIVES = {
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single", "batch_isend_irecv",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "scatter_object_list",
    "send",
}  # fmt: skip


def part_of(module: str) -> str:
    """``megalite.train.flops`` → ``train``; ``megalite`` itself → the empty string."""
    return module.split(".")[1] if "." in module else ""


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports of ``module`` that break the table, each as ``line N: …``."""
    found = []
    for name, line, _ in imports(ast.parse(source)):
        top = name.split(".")[0]
        part = part_of(module)
        if name.startswith("."):
            problem = "is relative"
        elif module.startswith("megalite_kernels"):
            allowed = {"megalite_kernels", "torch", "numpy"} | ({"triton"} if ".triton" in module else set())
            problem = "" if top in allowed | sys.stdlib_module_names else "is neither torch, numpy nor stdlib"
        elif top == "megalite":
            free = {part, "", "errors", "__version__"}
            problem = "" if part_of(name) in MAY_IMPORT[part] | free else "is the wrong direction"
        elif top == "megalite_kernels":
            problem = "" if part in MAY_IMPORT_KERNELS else "is the wrong direction"
        else:
            stdlib_only = part in STDLIB_ONLY and top not in sys.stdlib_module_names
            problem = "is not in the standard library" if stdlib_only else ""
        if problem:
            found.append(f"line {line}: import of {name} {problem}")
    return found


@pytest.mark.parametrize("package", ["megalite", "megalite_kernels"])
def test_imports_go_in_the_allowed_direction(package):
    wrong = {
        module: problems
        for module, path in modules(package).items()
        if (problems := wrong_imports(module, path.read_text(encoding="utf-8")))
    }
    assert not wrong


def test_every_part_has_a_row():
    assert {part_of(module) for module in modules("megalite")} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("megalite.layers.norm", "from megalite.train import flops", "wrong direction"),
        ("megalite.layers.norm", "def f():\n    import megalite.models.transformer", "wrong direction"),
        ("megalite.config", "import numpy", "not in the standard library"),
        ("megalite.data.order", "import megalite_kernels", "wrong direction"),
        ("megalite.interop.hf", "from megalite.train import checkpoint", "wrong direction"),
        ("megalite.train.trainer", "from . import flops", "relative"),
        (
            "megalite_kernels.ops.rope",
            "from megalite.config import ModelConfig",
            "neither torch, numpy nor stdlib",
        ),
        ("megalite_kernels.ops.rope", "import triton", "neither torch, numpy nor stdlib"),
    ],
)
def test_the_table_catches(module, source, problem):
    assert len(found := wrong_imports(module, source)) == 1
    assert problem in found[0]


def test_the_table_allows():
    assert not wrong_imports("megalite_kernels.triton.rope", "import triton\nimport triton.language as tl")
    assert not wrong_imports(
        "megalite.layers.norm",
        "from megalite import errors, __version__\nimport megalite\nimport megalite_kernels",
    )


def collective_calls(tree: ast.Module) -> list[int]:
    """Lines that call a collective as ``dist.NAME`` or ``torch.distributed.NAME``, or import one by name."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            lines += [node.lineno] if ast.unparse(node.value) in {"dist", "torch.distributed"} else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            lines += [node.lineno for alias in node.names if alias.name in COLLECTIVES]
    return sorted(lines)


def test_collectives_are_called_in_one_file():
    calls = {
        module: lines
        for module, path in modules("megalite").items()
        if module != "megalite.parallel.collectives" and (lines := collective_calls(parse(path)))
    }
    assert not calls, "go through megalite.parallel.collectives"
    assert collective_calls(ast.parse("dist.all_reduce(x)\nfrom torch.distributed import broadcast")) == [
        1,
        2,
    ]


def test_there_is_no_package_named_kernels():
    """Hugging Face ships a distribution of that name: with ours beside it, one of the two breaks."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
