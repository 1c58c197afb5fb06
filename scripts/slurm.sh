#!/usr/bin/env bash
# Trains on Slurm, one process per GPU; change the #SBATCH lines to your cluster's.
#
#   sbatch scripts/slurm.sh configs/ffhq_256.yaml [section.field=value ...]
#
# Before the time limit, and at a pre-emption, Slurm signals every process: they save and leave with code 75, and the
# job goes back into the queue, to continue from there. Any other code ends it; outcome.json in the run folder says why.
#SBATCH --job-name=nvae
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
trap : TERM USR1 # a signal to this shell too must not end it before those who train have saved

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
# srun takes the processors of a task from here, not from sbatch; each process shares its own with its loaders.
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=1
export SRUN_CPUS_PER_TASK OMP_NUM_THREADS MASTER_ADDR MASTER_PORT WORLD_SIZE PYTHON="${PYTHON:-.venv/bin/python}"

code=0
# shellcheck disable=SC2016 # each process reads its own rank
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$PYTHON" train.py "$@"' train "$@" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
