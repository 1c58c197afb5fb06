#!/usr/bin/env bash
# Makes .venv if needed, then lint, types and tests: 10 to 20 minutes on 2 cores.
#   bash scripts/test.sh            what every change must pass
#   bash scripts/test.sh --full     the slow tests as well, up to an hour
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=test
. scripts/environment.sh

selection=(-m "not full")
if [ "${1:-}" = "--full" ]; then
    selection=()
    shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy --strict nvae
.venv/bin/python -m pytest "${selection[@]}" "$@"
