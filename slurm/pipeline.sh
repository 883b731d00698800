#!/usr/bin/env bash
# The whole method as a chain of jobs: bootstrap (array), merge, train, export, evaluate. Run it where sbatch works.
#
#   slurm/pipeline.sh DIR [SBATCH_OPTION...] -- --config FILE [--data.annotations FILE ...] [-- EVALUATION_ARGUMENT...]
#
# What follows the second `--` is for evaluation alone, such as --data.image_root of its own images. Everything goes to
# DIR: groups.jsonl, run/, model/, results.json. Each job starts once the one before it has ended
# well; if one fails, those after it are cancelled. The same command again goes on from what is there. sbatch's options
# are for all jobs; nodes and GPUs of each: BPO_TRAIN_SBATCH_ARGS and its like in slurm/site.env.

set -euo pipefail

root="${BPO_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
# shellcheck source-path=SCRIPTDIR source=job.sh
source "$root/slurm/job.sh"

if (($# < 1)) || [[ "$1" == -* ]]; then
    echo "usage: slurm/pipeline.sh DIR [SBATCH_OPTION...] -- --config FILE [...] [-- EVALUATION_ARGUMENT...]" >&2
    exit 2
fi
folder="$1"
shift
load_site
split_arguments "$@"
options_of_all=("${options[@]}")
split_arguments "${arguments[@]}"
evaluation=()
if ((${#options[@]})); then
    evaluation=("${arguments[@]}")
    arguments=("${options[@]}")
fi
# Ours come last: they win, and so all stages agree.
arguments_of_all=("${arguments[@]}" --data.groups "$folder/groups.jsonl" --train.output_dir "$folder/run"
    --export.checkpoint "$folder/run" --export.output "$folder/model" --evaluation.output "$folder/results.json")

submitted=()
complete=false
# Half a chain is of no use to anybody.
take_back() {
    if ! $complete; then
        ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
        echo "error: not all jobs could be submitted; those that were have been cancelled" >&2
    fi
}
trap take_back EXIT

# stage SCRIPT ARGUMENT...: submits it after the stage before; sets `id`.
stage() {
    local script="$1" after=()
    shift
    if ((${#submitted[@]})); then
        after=("--dependency=afterok:${submitted[-1]}" --kill-on-invalid-dep=yes)
    fi
    id=$(submit "$script" "${after[@]}" "${options_of_all[@]}" -- "$@")
    submitted+=("$id")
}

stage bootstrap.sh "${arguments_of_all[@]}"
stage command.sh merge "${arguments_of_all[@]}"
stage train.sh "${arguments_of_all[@]}" --train.resume true
stage command.sh export "${arguments_of_all[@]}"
stage evaluate.sh "${arguments_of_all[@]}" "${evaluation[@]}" --model.path "$folder/model"
complete=true
echo "bootstrap, merge, train, export, evaluate: ${submitted[*]}; results: $folder/results.json"
