#!/usr/bin/env bash
# Evaluation of a suite of benchmarks, one task per GPU; the questions are divided among the tasks.
#
#   slurm/evaluate.sh [--time=2:00:00 --] --config FILE --model.path DIR [...]    submits itself, with site.env
#   sbatch slurm/evaluate.sh --config FILE --model.path DIR [...]                 from any folder
#
# The tasks of an array (--array=0-3) share the questions too. The first one scores and waits for the answers of the
# others: raise evaluation.stall_timeout_s if they may start hours later.
#
# On a signal before the time limit, or on preemption, the job is requeued; existing answers are kept.
#
#SBATCH --job-name=bpo-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Sent to every task, not to this shell; a batch of answers must finish within this time.
#SBATCH --signal=USR2@300

set -euo pipefail

# Only files of this script's own clone are run. sbatch runs a copy; Slurm has the path and the arguments as submitted.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [[ ! -f "$here/job.sh" ]]; then
    here="${BPO_ROOT:-}/slurm"
    if [[ $(scontrol show job "${SLURM_JOB_ID:-}" 2>&1) =~ $'\n'\ *Command=([^$'\n']*)evaluate\.sh ]]; then
        submitted="${BASH_REMATCH[1]%%evaluate.sh*}evaluate.sh"
        [[ "$submitted" == /* ]] || submitted="$SLURM_SUBMIT_DIR/$submitted"
        original=$(dirname "$(readlink -f "$submitted")")
        [[ ! -f "$submitted" || ! -f "$original/job.sh" ]] || here="$original"
    fi
fi
root="${here%/slurm}"
if [[ "$here" != */slurm || ! -f "$here/job.sh" ]]; then
    echo "error: this script's clone is not known; submit CLONE/slurm/evaluate.sh, or set BPO_ROOT to CLONE" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$root/slurm/job.sh"

if ! inside_job; then
    load_site
    split_arguments "$@"
    submit evaluate.sh "${options[@]}" -- "${arguments[@]}"
    exit
fi
enter_job
arguments=("$@")
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    array_shard
    arguments+=(--evaluation.shard_index "$shard" --evaluation.num_shards "$SLURM_ARRAY_TASK_COUNT")
fi
launch -m bpo.cli evaluate "${arguments[@]}"
finish "$code"
