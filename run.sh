#!/bin/sh
# sh run.sh [CONFIG.yaml] [key=value ...]
# Sets up if needed, trains as the config says (default: the built-in world), and evaluates if it says on what.
# Uses every visible GPU of this machine; NPROC=N asks for N processes. torchrun's own variables (PET_NNODES,
# PET_RDZV_ENDPOINT, ...) join several machines. Exit code 75: stopped on request, the same command goes on.
start=$PWD
export CLIPN_COMMAND="${NPROC:+NPROC=$NPROC }sh $0 $*"
cd "$(dirname "$0")" || exit 1
. scripts/setup.sh
set_up ''

case "${1:-}" in
    '' | *=*) config=configs/toy.yaml ;;
    *) config=$1; shift ;;
esac
if [ -f "$start/$config" ]; then config=$start/$config; fi

exec "$PYTHON" -m clipn train "$config" "$@"
