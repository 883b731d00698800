#!/usr/bin/env bash
# Bootstrapping: an array whose tasks share the annotations, then a merge of their results into one groups file.
#
#   slurm/bootstrap.sh [--array=0-31 --time=8:00:00 --] --config FILE [...] submits the array, and the merge after it
#   sbatch --array=0-31 slurm/bootstrap.sh --config FILE [...]              only the array; then: bpo merge --config ...
#
# The number of tasks is arbitrary and may change between submissions: finished records are not processed again. For
# tasks with several GPUs set both --ntasks-per-node and --gpus-per-node. On a signal before the time limit, or on
# preemption, the task is requeued and continues.
#
#SBATCH --job-name=bpo-bootstrap
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Sent to every task, not to this shell; a batch of answers must finish within this time.
#SBATCH --signal=USR2@300

set -euo pipefail

# Only files of this script's own clone are run. sbatch runs a copy; Slurm has the path and the arguments as submitted.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [[ ! -f "$here/job.sh" ]]; then
    here="${BPO_ROOT:-}/slurm"
    if [[ $(scontrol show job "${SLURM_JOB_ID:-}" 2>&1) =~ $'\n'\ *Command=([^$'\n']*)bootstrap\.sh ]]; then
        submitted="${BASH_REMATCH[1]%%bootstrap.sh*}bootstrap.sh"
        [[ "$submitted" == /* ]] || submitted="$SLURM_SUBMIT_DIR/$submitted"
        original=$(dirname "$(readlink -f "$submitted")")
        [[ ! -f "$submitted" || ! -f "$original/job.sh" ]] || here="$original"
    fi
fi
root="${here%/slurm}"
if [[ "$here" != */slurm || ! -f "$here/job.sh" ]]; then
    echo "error: this script's clone is not known; submit CLONE/slurm/bootstrap.sh, or set BPO_ROOT to CLONE" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$root/slurm/job.sh"

if ! inside_job; then
    load_site
    split_arguments "$@"
    start_chain
    chain bootstrap.sh "${options[@]}" -- "${arguments[@]}"
    chain command.sh -- merge "${arguments[@]}"
    end_chain
    echo "bootstrap ${submitted[0]}, merge ${submitted[1]}"
    exit
fi
enter_job
arguments=("$@")
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    array_shard
    arguments+=(--bootstrap.shard_index "$shard" --bootstrap.num_shards "$SLURM_ARRAY_TASK_COUNT")
fi
launch -m bpo.cli bootstrap "${arguments[@]}"
finish "$code"
