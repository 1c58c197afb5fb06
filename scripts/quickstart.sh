#!/usr/bin/env bash
# Makes .venv if needed, trains a small NVAE on real 8×8 digits, evaluates it, draws samples. Minutes on a CPU.
# Run again, it reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=
. scripts/environment.sh

.venv/bin/python train.py configs/digits.yaml
table="$(.venv/bin/python evaluate.py runs/digits --importance-samples 100 --draws 5)"
.venv/bin/python sample.py runs/digits --num 100 --temperature 1.0 >/dev/null
report="$(.venv/bin/python evaluate.py runs/digits --report | tail -n 1)"

cat <<SUMMARY

$table

pictures     runs/digits/samples/
${report/written: /report       }

Three commands to go on with, after: source .venv/bin/activate
  python sample.py runs/digits reconstruct          # test images beside what the model makes of them
  python train.py digits optim.lr=1e-2 name=slower  # a field changed: another run
  python train.py mnist_cpu                         # MNIST, which is fetched: half an hour on one core
SUMMARY
