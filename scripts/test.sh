#!/bin/sh
# sh scripts/test.sh [pytest arguments]: sets up if needed, then runs the linter and the tests in two processes.
cd "$(dirname "$0")/.." || exit 1
. scripts/setup.sh
set_up . requirements-dev.txt

"$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
