# Sourced by run.sh and scripts/test.sh. `set_up ROOT REQUIREMENTS EXTRA_IMPORTS` leaves in $PYTHON a Python that has
# the packages of ROOT/REQUIREMENTS: the Python at hand if it has them all, else ROOT/.venv, which is made once.

needed='import torch, torchvision, open_clip, numpy, sklearn, pandas, PIL, safetensors, omegaconf, yaml, matplotlib, tqdm, fsspec, aiohttp, jinja2'

has_all() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c "import sys; assert sys.version_info >= (3, 10); $needed; $2" >/dev/null 2>&1
}

new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

set_up() {
    venv=$1/.venv
    for PYTHON in "$venv/bin/python" python python3; do
        if has_all "$PYTHON" "$3"; then return; fi
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
    if ! has_all "$PYTHON" "$3"; then
        "$PYTHON" -c "$needed; $3"
        echo "error: $venv lacks what $2 names; delete it and try again" >&2
        exit 1
    fi
}
