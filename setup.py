"""Two import packages in one distribution, and the native library, which is optional.

Everything declarative is in pyproject.toml. This file only says what that one cannot: where the second
package lives (``kernels/megalite_kernels``), and how ``megalite_kernels._C`` is compiled. A machine
without a compiler gets a complete installation without it, and is told so; ``MEGALITE_NO_NATIVE=1`` skips
the compilation.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HEADERS = (".h", ".inc")
# Instruction sets are chosen inside the sources at run time, so one binary runs on every machine of an
# architecture: never -march=native. Sums keep their order: never -ffast-math.
COMPILE_FLAGS = [
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi",
]  # fmt: skip
OPENMP_FLAG = "-fopenmp"


def native_extensions() -> list[Extension]:
    """``megalite_kernels._C``, or nothing where it is unwanted or cannot be built."""
    bindings = ROOT / "csrc" / "bindings.cpp"
    if os.environ.get("MEGALITE_NO_NATIVE") == "1" or not bindings.exists():
        return []
    include = pybind11_include()
    if include is None:
        say_native_missing("pybind11's headers were not found (pip install pybind11)")
        return []
    sources = [bindings, *sorted(bindings.parent.glob("cpu/*.cpp"))]
    headers = sorted(path for path in bindings.parent.rglob("*") if path.suffix in HEADERS)
    return [
        Extension(
            "megalite_kernels._C",
            sources=[relative(path) for path in sources],
            depends=[relative(path) for path in headers],
            include_dirs=["csrc", include],
            extra_compile_args=[*COMPILE_FLAGS, OPENMP_FLAG],
            extra_link_args=[OPENMP_FLAG],
            language="c++",
            optional=True,
        )
    ]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pybind11_include() -> str | None:
    """Folder of pybind11's headers: its own package's, else the copy that torch ships."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
        if torch is None or torch.origin is None:
            return None
        folder = Path(torch.origin).parent / "include"
        return str(folder) if (folder / "pybind11").is_dir() else None
    return pybind11.get_include()


def compile_in_parallel() -> None:
    """Compile the files of an extension side by side, where pybind11's own package is there to do it."""
    try:
        from pybind11.setup_helpers import ParallelCompile
    except ImportError:
        return
    ParallelCompile("MEGALITE_BUILD_JOBS").install()


def say_native_missing(reason: str) -> None:
    """One sentence on what is missing, why, and what follows from it."""
    print(
        f"megalite: native CPU kernels are not built: {reason}. "
        "Everything works without them, slower, on the torch reference back-end.",
        file=sys.stderr,
    )


class OptionalBuildExt(build_ext):
    """Builds the native library; a failure is one clear sentence and an installation without it."""

    def build_extension(self, ext: Extension) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(
            missing_ok=True
        )  # an older one must not outlive a failure
        try:
            super().build_extension(ext)
        except Exception:  # every compiler, linker and platform failure means the same: try the next simpler
            print("megalite: trying again without OpenMP (one thread per native kernel)", file=sys.stderr)
            ext.extra_compile_args.remove(OPENMP_FLAG)
            ext.extra_link_args.remove(OPENMP_FLAG)
            try:
                super().build_extension(ext)
            except Exception:
                say_native_missing("the C++ compiler failed (its messages are above)")


compile_in_parallel()
setup(
    packages=[
        *find_packages(".", include=["megalite", "megalite.*"]),
        *find_packages("kernels", include=["megalite_kernels", "megalite_kernels.*"]),
    ],
    package_dir={"megalite": "megalite", "megalite_kernels": "kernels/megalite_kernels"},
    package_data={
        "megalite": ["py.typed", "train/report_template.html"],
        "megalite_kernels": ["py.typed", "*.pyi"],
    },
    include_package_data=False,
    ext_modules=native_extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
