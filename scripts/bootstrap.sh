#!/bin/sh
# Sets up .venv so that megalite runs from this checkout: `scripts/bootstrap.sh [corpus] [test] [triton] [cuda] [dev]`.
#
# Each argument is an extra of pyproject.toml. Every step leaves a stamp with a checksum of what it was made
# from, so a second run does nothing, and an edited pyproject.toml or C++ file redoes only what it touches.
#   PYTHON=…              the Python (>= 3.10) to build the environment with
#   MEGALITE_NO_NATIVE=1  leave the native CPU kernels out
#   MEGALITE_TORCH=…      what to install as torch (a pip requirement), instead of the choice made below
set -eu
cd "$(dirname "$0")/.."

TESTED_TORCH="torch==2.13.0"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
MINIMUM_TORCH="2.11"
INDEX_SECONDS=4 # how long PyTorch's CPU index may take to answer before the plain pin is used

VENV=.venv
PY=$VENV/bin/python
STARTED=$(date +%s)

say() { printf 'set-up: %s\n' "$*" >&2; }
die() { printf 'set-up: error: %s\n' "$*" >&2; exit 1; }
checksum() { cksum | cut -d ' ' -f 1,2 | tr ' ' '-'; }

# --- stamps: `fresh NAME KEY` is true when the step NAME was last done for exactly KEY ---------------------
fresh() { [ "$(cat "$VENV/.megalite-$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" > "$VENV/.megalite-$1"; }

# --- Python ---------------------------------------------------------------------------------------------------
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.10 or newer"
        return
    fi
    for PYTHON in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if new_enough "$PYTHON"; then return; fi
    done
    die "no Python 3.10 or newer was found (python3 is $(python3 --version 2>&1 || echo missing)); install one, or name it: make PYTHON=/path/to/python3 ..."
}

system_torch_has_cuda() {
    "$PYTHON" - "$MINIMUM_TORCH" <<'PYTHON_CODE' >/dev/null 2>&1
import sys, torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
minimum = tuple(int(part) for part in sys.argv[1].split("."))
of_the_system = sys.prefix == sys.base_prefix  # another virtual environment's packages would not be visible
sys.exit(not (of_the_system and torch.cuda.is_available() and version >= minimum))
PYTHON_CODE
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

make_venv() {
    if [ -x "$PY" ] && new_enough "$PY" && "$PY" -m pip --version >/dev/null 2>&1; then return; fi
    find_python
    options=
    if has_gpu && system_torch_has_cuda; then
        options=--system-site-packages
        say "$PYTHON has a torch that sees the GPU: the environment uses that one"
    fi
    say "making $VENV with $("$PYTHON" --version 2>&1)"
    # Debian and Ubuntu ship Python without ensurepip unless python3-venv is installed.
    "$PYTHON" -m venv --clear $options "$VENV" >/dev/null 2>&1 ||
        "$PYTHON" -m virtualenv --clear $options "$VENV" >/dev/null 2>&1 ||
        uv venv --clear --seed $options --python "$PYTHON" "$VENV" >/dev/null 2>&1 ||
        die "$PYTHON cannot make a virtual environment; install it (Debian, Ubuntu: apt install python3-venv), or pip install virtualenv"
}

# --- packages -------------------------------------------------------------------------------------------------
has_torch() {
    "$PY" - "$MINIMUM_TORCH" <<'PYTHON_CODE' >/dev/null 2>&1
import sys
from importlib.metadata import version
found = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
sys.exit(found < tuple(int(part) for part in sys.argv[1].split(".")))
PYTHON_CODE
}

cpu_index_answers() {
    "$PY" - "$TORCH_CPU_INDEX/torch/" "$INDEX_SECONDS" <<'PYTHON_CODE' >/dev/null 2>&1
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=float(sys.argv[2]))
PYTHON_CODE
}

pip_install() { "$PY" -m pip --quiet --disable-pip-version-check install "$@"; }

# Without a GPU, torch from the default index is 5 GB of CUDA on Linux: PyTorch's own CPU index is tried first.
install_torch() {
    if has_torch; then return; fi
    if [ -n "${MEGALITE_TORCH:-}" ]; then
        say "installing $MEGALITE_TORCH"
        pip_install "$MEGALITE_TORCH" || die "pip could not install MEGALITE_TORCH=$MEGALITE_TORCH"
    elif has_gpu; then
        say "installing torch for the GPU"
        pip_install "torch>=$MINIMUM_TORCH" || die "pip could not install torch; install torch >= $MINIMUM_TORCH into $VENV and run this again"
    else
        say "no GPU found: installing $TESTED_TORCH for the CPU"
        if [ "$(uname -s)" = Linux ] && cpu_index_answers && pip_install "$TESTED_TORCH" --index-url "$TORCH_CPU_INDEX"; then return; fi
        pip_install "$TESTED_TORCH" || die "pip could not install $TESTED_TORCH for $("$PY" --version 2>&1); try another Python (PYTHON=...) or another version (MEGALITE_TORCH='torch>=$MINIMUM_TORCH')"
    fi
}

# uv resolves in seconds where an old pip backtracks for minutes. It does not see the system's packages, though.
install_uv() { "$PY" -m uv --version >/dev/null 2>&1 || pip_install uv 2>/dev/null || say "uv is not available here: using pip, which is slower"; }

# What the environment lacks, as pyproject.toml names it; then megalite itself, from this folder.
install_packages() { # extras, comma-separated or empty
    options=; for extra in $(printf '%s' "$1" | tr ',' ' '); do options="$options --extra $extra"; done
    say "installing packages${1:+ (with $1)}"
    if grep -q 'include-system-site-packages = true' "$VENV/pyvenv.cfg" ||
        ! "$PY" -m uv pip install --quiet --python "$PY" -r pyproject.toml $options setuptools wheel pybind11 2>"$VENV/megalite-uv.log"; then
        pip_install setuptools wheel pybind11 && MEGALITE_NO_NATIVE=1 pip_install --no-build-isolation -e ".${1:+[$1]}" ||
            die "packages could not be installed: pip's messages are above, uv's in $VENV/megalite-uv.log"
    fi
    # The native library is its own step, below: so its compiler's messages are kept, and C++ edits redo only that.
    MEGALITE_NO_NATIVE=1 pip_install --no-build-isolation --no-deps -e . || die "megalite itself could not be installed into $VENV"
}

# --- the native library -----------------------------------------------------------------------------------------
# What it was built from, and whether it is there: installing a compiler, or losing the file, builds it again.
native_key() {
    {
        cat setup.py
        if [ -d csrc ]; then find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' \) -exec cksum {} + | sort; fi
        "$PY" -c 'import sys, sysconfig; print(sys.version, sysconfig.get_config_var("EXT_SUFFIX"))'
        "$PY" -c 'import importlib.metadata as m; print(m.version("torch"))' # the pool fits one version
        command -v "${CXX:-c++}" || echo "no compiler"
        echo "${MEGALITE_NO_NATIVE:-}"
        has_native && echo "built" || echo "not built"
    } | checksum
}

has_native() { ls kernels/megalite_kernels/_C*.so >/dev/null 2>&1; }

build_native() {
    rm -f kernels/megalite_kernels/_C*.so kernels/megalite_kernels/_pool*.so # an older one must not outlive a failed build
    if [ "${MEGALITE_NO_NATIVE:-}" = 1 ] || [ ! -e csrc/bindings.cpp ]; then return; fi
    began=$(date +%s)
    "$PY" setup.py -q build_ext --inplace >"$VENV/megalite-native.log" 2>&1 || true
    if has_native; then say "native CPU kernels built in $(($(date +%s) - began)) s"; fi
}

# Said on every run, since it is why things are slower than they could be.
report_native() {
    if [ "${MEGALITE_NO_NATIVE:-}" = 1 ] || [ ! -e csrc/bindings.cpp ]; then return; fi
    has_native || say "native CPU kernels are NOT built (no working C++ compiler? see $VENV/megalite-native.log): everything works without them, slower"
}

# --- the steps ------------------------------------------------------------------------------------------------
for extra in "$@"; do
    case $extra in corpus | test | triton | cuda | dev) ;; *) die "unknown extra '$extra'; there are: corpus, test, triton, cuda, dev" ;; esac
done

recipe=$(cat pyproject.toml setup.py scripts/bootstrap.sh | checksum)
wanted= # extras whose packages are not there yet, comma-separated
for extra in "$@"; do fresh "$extra" "$recipe" || wanted="${wanted:+$wanted,}$extra"; done
if ! fresh base "$recipe" || [ -n "$wanted" ] || ! "$PY" -c '' 2>/dev/null; then
    make_venv
    install_torch
    install_uv
    install_packages "$wanted"
    stamp base "$recipe"
    for extra in $(printf '%s' "$wanted" | tr ',' ' '); do stamp "$extra" "$recipe"; done
fi
if ! fresh native "$(native_key)"; then
    build_native
    stamp native "$(native_key)"
fi
report_native
say "ready in $(($(date +%s) - STARTED)) s"
