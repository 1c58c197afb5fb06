#!/usr/bin/env bash
# Makes .venv if needed, trains a small NVAE on real 8×8 digits, evaluates it, draws samples. Minutes on a CPU.
# Run again, it reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=
. scripts/environment.sh

.venv/bin/python train.py configs/digits.yaml
.venv/bin/python evaluate.py runs/digits --importance-samples 100 --draws 5
.venv/bin/python sample.py runs/digits --num 100 --temperature 1.0
