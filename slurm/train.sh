#!/usr/bin/env bash
# Trains on SLURM, one task per GPU, started by srun without a launcher in between (a launcher that gets the
# scheduler's signal dies and orphans its workers).
#
#   sbatch slurm/train.sh --config FILE [--train.lr 1e-6 ...]
#   sbatch --nodes=4 --partition=gpu slurm/train.sh --config FILE     sbatch's own options come first and win
#
# Submit from the root of the clone. Site settings (module load, NCCL_*, caches) go into slurm/site.env, which is
# sourced where it exists. Nodes with another number of GPUs: pass --ntasks-per-node and --gpus-per-node, both.
#
#SBATCH --job-name=bpo-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# To every task, not to this shell, five minutes before the time limit.
#SBATCH --signal=USR2@300

set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "error: not inside a SLURM job; start it with: sbatch slurm/train.sh --config FILE" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"

if [[ -f slurm/site.env ]]; then
    # Site files are written for interactive shells and may use unset variables.
    set +u
    # shellcheck source=/dev/null
    source slurm/site.env
    set -u
fi
if [[ -d .venv/bin ]]; then
    export PATH="$PWD/.venv/bin:$PATH" # ninja, for the operations DeepSpeed compiles at first use
fi

# Quoted, because a node list such as gpu[01-04] is a pattern to the shell.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes%%$'\n'*}"
# Without it, the folder of the program comes first on sys.path and may hide installed packages.
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# Since SLURM 22.05 srun does not take this from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

arguments=("$@")
restarts="${SLURM_RESTART_COUNT:-0}"
if ((restarts > 0)); then
    arguments+=(--train.resume true)
fi

echo "[$(date -Is)] job $SLURM_JOB_ID, restart $restarts, $SLURM_NTASKS tasks on: ${nodes//$'\n'/ }"
code=0
srun --kill-on-bad-exit=1 --wait=120 python -m bpo.train "${arguments[@]}" || code=$?
# 75: a signal came, every rank agreed, a checkpoint is written; the same job goes on from it.
if ((code == 75)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
