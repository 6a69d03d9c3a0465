#!/bin/sh
# sh run.sh [CONFIG.yaml] [key=value ...]
# Sets up if needed, trains as the config says (default: the built-in world), and evaluates if it names image sets.
# Uses every visible GPU of this machine; NPROC=N asks for N processes. torchrun's own variables (PET_NNODES,
# PET_RDZV_ENDPOINT, ...) join several machines. Relative paths are those of the folder where the command is typed.
# Exit code 75: stopped on request, the same command resumes.
root=$(cd "$(dirname "$0")" && pwd) || exit 1
. "$root/scripts/setup.sh"
set_up "$root" requirements.txt

export CLIPN_PROGRAM="$0" # for the command that a stopped run prints
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m clipn train "$@"
