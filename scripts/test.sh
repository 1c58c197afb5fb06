#!/usr/bin/env bash
# Makes .venv if needed, then lint, types and tests.
#   bash scripts/test.sh               what every change must pass: 15 to 23 minutes on 2 cores
#   bash scripts/test.sh --quick       without the slow tests, some 6 minutes: before every commit
#   bash scripts/test.sh ROOM          the tests of one room of nvae/, or of the house
#   bash scripts/test.sh --full        the slowest tests as well, up to an hour
#   bash scripts/test.sh --coverage    the first, then the lines of nvae/ that no test ran
# They combine; further arguments go to pytest: bash scripts/test.sh --quick training -k signal
set -euo pipefail
cd "$(dirname "$0")/.."

selection="not full" tests=() options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --quick) selection="not full and not slow" ;;
        --full) selection="" ;;
        --coverage) options+=(--cov --cov-report=term:skip-covered) ;;
        models) tests+=(tests/models tests/test_parity*.py) ;;
        *)
            compgen -G "tests/$1/test_*.py" >/dev/null || break
            tests+=("tests/$1")
            ;;
    esac
    shift
done

extras=test
. scripts/environment.sh

# A process a core: PyTorch's own threads would only stand in each other's way. What is compiled is kept for the next run.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$PWD/.cache/inductor"

.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
types="$(mktemp)"
.venv/bin/mypy --strict nvae >"$types" 2>&1 &
checker=$!
trap 'kill $checker 2>/dev/null || true; rm -f "$types"' EXIT

failed=0
.venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder \
    -m "$selection" ${options[@]+"${options[@]}"} \
    ${tests[@]+"${tests[@]}"} "$@" || failed=$?
wait $checker || failed=$?
cat "$types"
exit $failed
