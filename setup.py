"""Two import packages in one distribution, native libraries and compiled CUDA kernels, which are optional.

Everything declarative is in pyproject.toml. This file only says what that one cannot: where the second
package lives (``kernels/megalite_kernels``), and how ``megalite_kernels._C`` is compiled. A machine
without a compiler gets a complete installation without it, and is told so; ``MEGALITE_NO_NATIVE=1`` skips
the compilation. ``megalite_kernels._pool``, the pool for large tensors, needs torch's headers: it is compiled where
torch is installed already, and unused with another torch.

The CUDA kernels' sources are always part of an installation, and compiled on the user's GPU when one is needed.
``MEGALITE_CUDA_BUILD`` says whether nvcc compiles them here already:
  auto  the default: where nvcc is found, for at most a minute; not in editable installations
  1     all of them, however long it takes; without nvcc, or if one fails, the installation fails
  0     none
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import types
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
HEADERS = (".h", ".inc")
# Instruction sets are chosen inside the sources at run time, so one binary runs on every machine of an
# architecture: never -march=native. Sums keep their order: never -ffast-math.
COMPILE_FLAGS = [
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi",
]  # fmt: skip
OPENMP_FLAG = "-fopenmp"
POOL = "megalite_kernels._pool"
CUDA_FOLDER = "megalite_kernels/native/cuda"
CUDA_ARCHIVE = f"{CUDA_FOLDER}/kernels.zip"
CUDA_BUDGET_S = 60.0
"""A pip install must not take minutes that nobody asked for: what is late is compiled when it is needed."""


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
    headers = [path for path in headers if path.parent.name != "pool"]
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
        ),
        *pool_extensions(),
    ]


def pool_extensions() -> list[Extension]:
    """``megalite_kernels._pool``, on Linux and where torch is."""
    torch = torch_folder()
    if sys.platform != "linux" or torch is None or not (torch / "lib" / "libc10.so").exists():
        return []
    folder = ROOT / "csrc" / "pool"
    return [
        Extension(
            POOL,
            sources=[relative(folder / "allocator.cpp")],
            depends=[relative(folder / "pool.h")],
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["c10"],
            extra_compile_args=[*COMPILE_FLAGS],
            language="c++",
            optional=True,
        )
    ]


def torch_folder() -> Path | None:
    """Where torch is: found, not imported, since that would take seconds.

    In pip's isolated builds it cannot be imported, but the environment that is installed into is this Python's.
    """
    torch = importlib.util.find_spec("torch")
    folder = (
        Path(torch.origin).parent if torch and torch.origin else Path(sysconfig.get_path("platlib"), "torch")
    )
    return folder if folder.is_dir() else None


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pybind11_include() -> str | None:
    """Folder of pybind11's headers: its own package's, else the copy that torch ships."""
    try:
        import pybind11
    except ImportError:
        torch = torch_folder()
        return str(torch / "include") if torch and (torch / "include" / "pybind11").is_dir() else None
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
            if ext.name == POOL:
                print(
                    "megalite: the pool for large tensors is not built: torch's own allocator",
                    file=sys.stderr,
                )
                return
            print("megalite: trying again without OpenMP (one thread per native kernel)", file=sys.stderr)
            ext.extra_compile_args.remove(OPENMP_FLAG)
            ext.extra_link_args.remove(OPENMP_FLAG)
            try:
                super().build_extension(ext)
            except Exception:
                say_native_missing("the C++ compiler failed (its messages are above)")


class BuildPyWithCuda(build_py):
    """Puts the CUDA sources beside the Python that compiles them: in a checkout they are in csrc/cuda."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, CUDA_FOLDER, "csrc")
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / source.name)


class BuildCuda(Command):
    """Compiles the CUDA kernels with nvcc, if it is there and MEGALITE_CUDA_BUILD doesn't object."""

    description = "compile the CUDA kernels ahead of time"
    user_options = [("build-lib=", None, "folder of the built package")]  # noqa: RUF012 (as setuptools has it)
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        wanted = os.environ.get("MEGALITE_CUDA_BUILD") or "auto"
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"megalite: MEGALITE_CUDA_BUILD is {wanted!r}: use 0, 1 or auto")
        archive = (ROOT / "kernels" if self.editable_mode else Path(self.build_lib or "")) / CUDA_ARCHIVE
        if wanted == "0" or (wanted == "auto" and self.editable_mode):
            archive.unlink(missing_ok=True)  # an older one must not outlive the wish for none
            return
        problem = compile_cuda(archive, None if wanted == "1" else CUDA_BUDGET_S)
        if problem and wanted == "1":
            raise SystemExit(f"megalite: MEGALITE_CUDA_BUILD=1, but {problem}")

    def get_source_files(self) -> list[str]:
        return [relative(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]

    def get_outputs(self) -> list[str]:
        archive = Path(self.build_lib or "", CUDA_ARCHIVE)
        return [str(archive)] if archive.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def compile_cuda(archive: Path, budget_s: float | None) -> str | None:
    """Compile the shipped kernels into `archive`; says in one sentence what came of it, and returns what went wrong."""
    builder, sources = torch_free("build"), torch_free("sources")
    nvcc, kernels = builder.find_nvcc(), sources.shipped()
    if nvcc is None:
        print(
            "megalite: CUDA kernels are not compiled now (no nvcc here): NVRTC, a part of torch for CUDA, compiles "
            "each at its first use.",
            file=sys.stderr,
        )
        return "nvcc was not found on PATH, in CUDA_HOME, or in the package nvidia-cuda-nvcc"
    jobs = int(os.environ.get("MEGALITE_BUILD_JOBS") or os.cpu_count() or 1)
    built = builder.build_archive(kernels, nvcc, archive, jobs=jobs, budget_s=budget_s or float("inf"))
    failed = f", {len(built.failures)} failed: {built.failures[0]}" if built.failures else ""
    late = (
        f", {built.late} left for their first use (MEGALITE_CUDA_BUILD=1 compiles all)" if built.late else ""
    )
    print(
        f"megalite: {built.compiled + built.reused} of {len(kernels)} CUDA kernels compiled in {built.seconds:.0f} s "
        f"with nvcc {'.'.join(map(str, nvcc.version))}{late}{failed}",
        file=sys.stderr,
    )
    return f"{len(built.failures)} kernels did not compile: {built.failures[0]}" if built.failures else None


def torch_free(module: str) -> types.ModuleType:
    """A module of megalite_kernels.native.cuda, without its packages' own code, which imports torch."""
    for name in ("megalite_kernels", "megalite_kernels.native"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(ROOT.joinpath("kernels", *name.split(".")))]
            sys.modules[name] = package
    return importlib.import_module(f"megalite_kernels.native.cuda.{module}")


compile_in_parallel()
build.sub_commands = [*build.sub_commands, ("build_cuda", None)]
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
    cmdclass={"build_ext": OptionalBuildExt, "build_py": BuildPyWithCuda, "build_cuda": BuildCuda},
)
