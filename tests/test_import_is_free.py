"""Importing costs nothing and changes nothing: torch and numpy are enough, and no state is touched.

Each check runs in its own interpreter, since this one has imported everything already.
"""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.source import PACKAGES, modules

ONLY_TORCH_AND_NUMPY = """
import importlib.metadata as metadata, re, sys

def closure(names):
    \"\"\"Distributions that installing `names` brings, without extras.\"\"\"
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                requires = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            todo += [re.match(r"[A-Za-z0-9._-]+", r)[0] for r in requires if "extra ==" not in r]
    return found

allowed = closure(["torch", "numpy"]) - {"triton"}

class Blocker:
    \"\"\"Makes every other installed package look absent.\"\"\"
    blocked = {
        top for top, owners in metadata.packages_distributions().items()
        if top not in {"megalite", "megalite_kernels"}
        and not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    }
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

assert {"tyro", "pytest"} <= Blocker.blocked, "the blocker blocks nothing"
sys.meta_path.insert(0, Blocker())
"""

STATE = """
import logging, os, signal, threading, warnings, torch, numpy as np

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "seed": torch.initial_seed(),
        "random state": torch.get_rng_state().tolist(),
        "numpy state": np.random.get_state()[1].tolist(),
        "warnings": list(warnings.filters),
        "log handlers": list(logging.root.handlers),
        "signals": [signal.getsignal(number) for number in (2, 10, 12, 15)],
        "cuda": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
    }
"""

CHECK = """
import importlib
before = state()
for name in NAMES:
    importlib.import_module(name)
after = state()
changed = [key for key in before if before[key] != after[key]]
assert not changed, f"importing changed: {changed}"
"""


def run(code: str) -> None:
    paths = [str(folder.parent) for folder in PACKAGES.values()]
    prelude = f"import sys\nsys.path[:0] = {paths!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "importing printed something"


def library_modules() -> list[str]:
    """What other codebases import; the parts behind commands (data, train, cli) have needs of their own."""
    kernels = [name for name in modules("megalite_kernels") if ".triton" not in name]
    parts = tuple(
        f"megalite.{part}" for part in ("config", "errors", "layers", "models", "optim", "parallel")
    )
    return [*kernels, *(name for name in modules("megalite") if name == "megalite" or name.startswith(parts))]


def test_the_packages_need_torch_and_numpy_alone():
    run(ONLY_TORCH_AND_NUMPY + "import megalite, megalite_kernels")


def test_importing_any_library_module_changes_no_state():
    run(ONLY_TORCH_AND_NUMPY + STATE + f"NAMES = {library_modules()!r}\n" + CHECK)


def test_importing_every_module_of_the_commands_changes_no_state_of_torch():
    """Their third-party packages may do as they like; torch, signals, seeds, environment stay."""
    names = [name for name in modules("megalite") if not name.endswith("__main__")]
    third_party = "import rich, tyro, safetensors.torch, tokenizers, pyarrow.parquet, zstandard, matplotlib\n"
    third_party += "import sympy\n"  # torch imports it for DCP and FSDP2; it adds a warnings filter
    run(third_party + STATE + f"NAMES = {names!r}\n" + CHECK)


def test_the_version_is_known_without_torch():
    run("import megalite\nassert megalite.__version__\nassert 'torch' not in sys.modules")


def test_a_run_that_does_not_compile_imports_no_inductor():
    """Which takes a second, in every rank at every start and restart."""
    run(
        "import torch\n"
        "from megalite.config import RunConfig\n"
        "from megalite.parallel.mesh import Mesh\n"
        "from megalite.train.setup import prepare_process\n"
        "prepare_process(RunConfig(), Mesh(torch.device('cpu')))\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "assert 'torch._inductor' not in sys.modules"
    )
