# Sourced by run.sh and scripts/test.sh, from the project's root: leaves in $PYTHON a Python that has what
# requirements.txt names. The Python at hand is used if it has it all, else .venv, which is made once and reused.

needed='import torch, torchvision, open_clip, numpy, sklearn, pandas, PIL, safetensors, omegaconf, yaml, matplotlib, tqdm, fsspec, aiohttp, gradio'

has_all() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c "import sys; assert sys.version_info >= (3, 10); $needed; $2" >/dev/null 2>&1
}

new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# set_up EXTRA_IMPORTS
set_up() {
    for PYTHON in .venv/bin/python python python3; do
        if has_all "$PYTHON" "$1"; then return; fi
    done
    if command -v uv >/dev/null 2>&1; then
        echo "setting up .venv with uv" >&2
        if [ ! -x .venv/bin/python ]; then uv venv --quiet --python '>=3.10' .venv || exit 1; fi
        uv pip install --quiet --compile-bytecode --python .venv/bin/python -r requirements.txt -e . || exit 1
    else
        for PYTHON in .venv/bin/python python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
            if new_enough "$PYTHON"; then break; fi
            PYTHON=
        done
        if [ -z "$PYTHON" ]; then
            echo "error: Python 3.10 or later is needed; this machine has $(python3 --version 2>&1 || echo none)" >&2
            exit 1
        fi
        echo "setting up .venv with pip (this downloads PyTorch, some minutes)" >&2
        if [ ! -x .venv/bin/python ]; then "$PYTHON" -m venv .venv || exit 1; fi
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e . || exit 1
    fi
    PYTHON=.venv/bin/python
    if ! has_all "$PYTHON" "$1"; then
        "$PYTHON" -c "$needed; $1"
        echo "error: .venv lacks what requirements.txt names; delete .venv and try again" >&2
        exit 1
    fi
}
