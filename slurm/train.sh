#!/usr/bin/env bash
# Preference training, one task per GPU.
#
#   slurm/train.sh [--nodes=4 --time=12:00:00 --] --config FILE [--train.lr 1e-6 ...]    submits itself, with site.env
#   sbatch --nodes=4 slurm/train.sh --config FILE [...]                                  from any folder
#
# sbatch's options override those below and, in the first form, BPO_SBATCH_ARGS of slurm/site.env. For nodes with a
# different number of GPUs set both --ntasks-per-node and --gpus-per-node.
#
# On a signal before the time limit, or on preemption, the job saves a checkpoint, requeues itself and continues.
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
# Sent to every task, not to this shell, five minutes before the time limit (up to a minute earlier). Larger models take
# longer to save: docs/cluster.md.
#SBATCH --signal=USR2@300

set -euo pipefail

# Only files of this script's own clone are run. sbatch runs a copy; Slurm has the path and the arguments as submitted.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [[ ! -f "$here/job.sh" ]]; then
    here="${BPO_ROOT:-}/slurm"
    if [[ $(scontrol show job "${SLURM_JOB_ID:-}" 2>&1) =~ $'\n'\ *Command=([^$'\n']*)train\.sh ]]; then
        submitted="${BASH_REMATCH[1]%%train.sh*}train.sh"
        [[ "$submitted" == /* ]] || submitted="$SLURM_SUBMIT_DIR/$submitted"
        original=$(dirname "$(readlink -f "$submitted")")
        [[ ! -f "$submitted" || ! -f "$original/job.sh" ]] || here="$original"
    fi
fi
root="${here%/slurm}"
if [[ "$here" != */slurm || ! -f "$here/job.sh" ]]; then
    echo "error: this script's clone is not known; submit CLONE/slurm/train.sh, or set BPO_ROOT to CLONE" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$root/slurm/job.sh"

if ! inside_job; then
    load_site
    split_arguments "$@"
    submit train.sh "${options[@]}" -- "${arguments[@]}"
    exit
fi
enter_job
arguments=("$@")
if ((restarts > 0)); then
    arguments+=(--train.resume true)
fi
launch -m bpo.train "${arguments[@]}"
finish "$code"
