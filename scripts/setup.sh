# Sourced by run.sh and scripts/test.sh. `set_up ROOT REQUIREMENTS` sets $PYTHON to a Python that has the packages of
# ROOT/REQUIREMENTS: ROOT/.venv or the Python on PATH if it has them all, else ROOT/.venv, which is created once.

# has_all PYTHON FILE: whether this Python is 3.10 or later and has every package of a requirements file installed.
# Gradio may be missing: only `clipn demo` needs it.
has_all() {
    command -v "$1" >/dev/null 2>&1 && "$1" - "$2" <<'END'
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(file):
    for line in file.read_text().splitlines():
        if line.startswith("-r "):
            yield from missing(file.with_name(line[3:].strip()))
        elif line and not line.startswith("#"):
            names = re.findall(r"^[\w.-]+", line) + ["aiohttp"] * ("[http]" in line)
            yield from (name for name in names if name != "gradio" and not installed(name))


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if sys.version_info < (3, 10):
    sys.exit("needs Python 3.10 or later")
sys.exit(", ".join(missing(Path(sys.argv[1]))) or 0)
END
}

new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

set_up() {
    venv=$1/.venv
    for PYTHON in "$venv/bin/python" python python3; do
        if has_all "$PYTHON" "$1/$2" 2>/dev/null; then return; fi
    done
    echo "setting up $venv (this downloads PyTorch with its CUDA libraries, about 3 GB, and takes some minutes)" >&2
    if command -v uv >/dev/null 2>&1; then
        if [ ! -x "$venv/bin/python" ]; then uv venv --quiet --python '>=3.10' "$venv" || exit 1; fi
        uv pip install --quiet --compile-bytecode --python "$venv/bin/python" -r "$1/$2" -e "$1" || exit 1
    else
        for PYTHON in "$venv/bin/python" python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
            if new_enough "$PYTHON"; then break; fi
            PYTHON=
        done
        if [ -z "$PYTHON" ]; then
            echo "error: Python 3.10 or later is needed; this machine has $(python3 --version 2>&1 || echo none)" >&2
            exit 1
        fi
        if [ ! -x "$venv/bin/python" ]; then "$PYTHON" -m venv "$venv" || exit 1; fi
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1/$2" -e "$1" || exit 1
    fi
    PYTHON=$venv/bin/python
    if ! has_all "$PYTHON" "$1/$2"; then
        echo "error: $venv lacks packages of $2, named above; delete it and try again" >&2
        exit 1
    fi
}
