#!/usr/bin/env bash
# Runs one bpo command that needs no GPU as a job: merge, export, refs.
#
#   slurm/command.sh [--mem=200G --] COMMAND [...]     submits itself, with BPO_COMMAND_SBATCH_ARGS of slurm/site.env
#   sbatch slurm/command.sh COMMAND [...]              from the root of the clone
#
#SBATCH --job-name=bpo-command
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=2:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

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
    submit command.sh "${options[@]}" -- "${arguments[@]}"
    exit
fi
enter_job
launch -m bpo.cli "$@"
finish "$code"
