#!/usr/bin/env bash
# Runs one bpo command that needs no GPU as a job: merge, select, export, refs.
#
#   slurm/command.sh [--mem=200G --] COMMAND [...]     submits itself, with BPO_COMMAND_SBATCH_ARGS of slurm/site.env
#   sbatch slurm/command.sh COMMAND [...]              from any folder
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

# Only files of this script's own clone are run. sbatch runs a copy; Slurm has the path and the arguments as submitted.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [[ ! -f "$here/job.sh" ]]; then
    here="${BPO_ROOT:-}/slurm"
    if [[ $(scontrol show job "${SLURM_JOB_ID:-}" 2>&1) =~ $'\n'\ *Command=([^$'\n']*)command\.sh ]]; then
        submitted="${BASH_REMATCH[1]%%command.sh*}command.sh"
        [[ "$submitted" == /* ]] || submitted="$SLURM_SUBMIT_DIR/$submitted"
        original=$(dirname "$(readlink -f "$submitted")")
        [[ ! -f "$submitted" || ! -f "$original/job.sh" ]] || here="$original"
    fi
fi
root="${here%/slurm}"
if [[ "$here" != */slurm || ! -f "$here/job.sh" ]]; then
    echo "error: this script's clone is not known; submit CLONE/slurm/command.sh, or set BPO_ROOT to CLONE" >&2
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
