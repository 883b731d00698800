#!/usr/bin/env bash
# Evaluation with CHAIR and POPE, one task per GPU; the questions are divided among the tasks.
#
#   slurm/evaluate.sh [--time=2:00:00 --] --config FILE --model.path DIR [...]    submits itself, with site.env
#   sbatch slurm/evaluate.sh --config FILE --model.path DIR [...]                 from the root of the clone
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

root="${BPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}"
if [[ ! -f "$root/slurm/job.sh" ]]; then
    echo "error: $root is not the root of the clone; submit from there, or set BPO_ROOT to it" >&2
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
launch -m bpo.cli evaluate "$@"
finish "$code"
