#!/bin/sh
# sh run.sh [CONFIG.yaml] [key=value ...]
# Sets up if needed, trains as the config says (default: the built-in world), and evaluates if it says on what.
# Uses every visible GPU of this machine; NPROC=N asks for N processes. torchrun's own variables (PET_NNODES,
# PET_RDZV_ENDPOINT, ...) join several machines. Exit code 75: stopped on request, the same command goes on.
start=$PWD
export CLIPN_COMMAND="sh $0 $*"
cd "$(dirname "$0")" || exit 1
. scripts/setup.sh
set_up ''

case "${1:-}" in
    '' | *=*) config=configs/toy.yaml ;;
    *) config=$1; shift ;;
esac
if [ -f "$start/$config" ]; then config=$start/$config; fi

processes=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ -n "${PET_RDZV_ENDPOINT:-}${PET_MASTER_ADDR:-}" ]; then
    exec "$PYTHON" scripts/launch.py --nproc_per_node="$processes" scripts/train.py "$config" "$@"
elif [ "$processes" -gt 1 ]; then
    exec "$PYTHON" scripts/launch.py --standalone --nproc_per_node="$processes" scripts/train.py "$config" "$@"
fi
exec "$PYTHON" scripts/train.py "$config" "$@"
