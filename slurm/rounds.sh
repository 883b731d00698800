#!/usr/bin/env bash
# Rounds of generation by the current policy and training on it, as a chain of jobs. Run it where sbatch works.
#
#   slurm/rounds.sh [SBATCH_OPTION... --] --config FILE [--rounds.output_dir DIR ...]
#
# Submits a job for each stage that is not finished: generation (an array) and its merge, judging (an array), selection,
# training, export, of every round. Each starts when the previous one has succeeded; if one fails, the later ones are
# cancelled. Running the same command again continues. sbatch's options apply to all jobs; set nodes, GPUs and tasks of
# each kind of job with BPO_BOOTSTRAP_SBATCH_ARGS, BPO_TRAIN_SBATCH_ARGS etc. in slurm/site.env.

set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$root/slurm/job.sh"

load_site
split_arguments "$@"
options_of_all=("${options[@]}")
# One line per job, fields separated by tabs: name, script of this folder, arguments that end with the stage's options.
listed=$(run_here -m bpo.cli rounds "${arguments[@]}" --jobs)
[[ -n "$listed" ]] || { echo "all rounds are finished: no job to submit"; exit; }
mapfile -t jobs <<<"$listed"
here=$(pwd -P)
queued=$(squeue --me --noheader --format='%i %Z %o')
for job in "${jobs[@]}"; do
    if [[ "$job" != *$'\t'*.sh$'\t'*.yaml ]]; then
        echo "error: bpo rounds --jobs printed, instead of a job: $job" >&2
        exit 2
    fi
    options_file="${job##*$'\t'}"
    while read -r id other; do
        if [[ "$other" == "$here "*" ${options_file%/*}/"* ]]; then
            echo "error: job $id of these rounds is in the queue; wait for it, or cancel it and the jobs after it" >&2
            exit 1
        fi
    done <<<"$queued"
done

start_chain
for job in "${jobs[@]}"; do
    IFS=$'\t' read -r -a fields <<<"$job"
    chain "${fields[1]}" "--job-name=${fields[0]}" "${options_of_all[@]}" -- "${fields[@]:2}"
    echo "${fields[0]}: ${submitted[-1]}"
done
end_chain
