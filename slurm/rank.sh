#!/usr/bin/env bash
# Judging: an array whose tasks share the candidates of a groups file.
#
#   slurm/rank.sh [--array=0-31 --time=8:00:00 --] --config FILE [...]    submits itself, with slurm/site.env
#   sbatch --array=0-31 slurm/rank.sh --config FILE [...]                 from any folder
#
# The number of tasks is arbitrary and may change between submissions: judged groups are not judged again. On a signal
# before the time limit, or on preemption, the task is requeued and continues.
#
#SBATCH --job-name=bpo-rank
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Sent to every task, not to this shell; a batch of groups must be judged within this time.
#SBATCH --signal=USR2@300

set -euo pipefail

# Only files of this script's own clone are run. sbatch runs a copy; Slurm has the path and the arguments as submitted.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [[ ! -f "$here/job.sh" ]]; then
    here="${BPO_ROOT:-}/slurm"
    if [[ $(scontrol show job "${SLURM_JOB_ID:-}" 2>&1) =~ $'\n'\ *Command=([^$'\n']*)rank\.sh ]]; then
        submitted="${BASH_REMATCH[1]%%rank.sh*}rank.sh"
        [[ "$submitted" == /* ]] || submitted="$SLURM_SUBMIT_DIR/$submitted"
        original=$(dirname "$(readlink -f "$submitted")")
        [[ ! -f "$submitted" || ! -f "$original/job.sh" ]] || here="$original"
    fi
fi
root="${here%/slurm}"
if [[ "$here" != */slurm || ! -f "$here/job.sh" ]]; then
    echo "error: this script's clone is not known; submit CLONE/slurm/rank.sh, or set BPO_ROOT to CLONE" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$root/slurm/job.sh"

if ! inside_job; then
    load_site
    split_arguments "$@"
    submit rank.sh "${options[@]}" -- "${arguments[@]}"
    exit
fi
enter_job
arguments=("$@")
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    array_shard
    arguments+=(--rank.shard_index "$shard" --rank.num_shards "$SLURM_ARRAY_TASK_COUNT")
fi
launch -m bpo.cli rank "${arguments[@]}"
finish "$code"
