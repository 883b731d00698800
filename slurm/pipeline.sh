#!/usr/bin/env bash
# The whole method as a chain of jobs: bootstrap (array), merge, train, export, evaluate. Run it where sbatch works.
#
#   slurm/pipeline.sh DIR [SBATCH_OPTION...] -- --config FILE [--data.annotations FILE ...] [-- EVALUATION_ARGUMENT...]
#
# Arguments after the second `--` go to evaluation only, such as --data.image_root of its own images. All output goes to
# DIR: groups.jsonl, run/, model/, results.json. Each job starts when the previous one has succeeded; if one fails, the
# later ones are cancelled. Running the same command again continues from the existing output. sbatch's options apply to
# all jobs; set nodes and GPUs of each stage with BPO_TRAIN_SBATCH_ARGS etc. in slurm/site.env.

set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
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
# These come last and override the caller's, so that all stages use the same paths.
arguments_of_all=("${arguments[@]}" --data.groups "$folder/groups.jsonl" --train.output_dir "$folder/run"
    --export.checkpoint "$folder/run" --export.output "$folder/model" --evaluation.output "$folder/results.json")

start_chain
chain bootstrap.sh "${options_of_all[@]}" -- "${arguments_of_all[@]}"
chain command.sh "${options_of_all[@]}" -- merge "${arguments_of_all[@]}"
chain train.sh "${options_of_all[@]}" -- "${arguments_of_all[@]}" --train.resume true
chain command.sh "${options_of_all[@]}" -- export "${arguments_of_all[@]}"
chain evaluate.sh "${options_of_all[@]}" -- "${arguments_of_all[@]}" "${evaluation[@]}" --model.path "$folder/model"
end_chain
echo "bootstrap, merge, train, export, evaluate: ${submitted[*]}; results: $folder/results.json"
