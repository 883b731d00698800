# Shared functions of the scripts in this folder, which set `root` (the clone) and source this file.
# shellcheck shell=bash disable=SC2154
#
#   load_site         loads the site's settings
#   split_arguments   separates sbatch's options from bpo's
#   submit            submits a script of this folder with sbatch
#   start_chain, chain, end_chain    submit jobs each of which starts after the one before; all or none
#   enter_job         sets up the environment of a job
#   array_shard       tells a task its place in its array
#   run_here          runs Python outside of a job, in the site's container
#   launch            starts one task per GPU with srun, in the site's container
#   finish            requeues a job that should continue, and exits

# Defaults of the settings in slurm/site.env.
BPO_SBATCH_ARGS=()
BPO_BOOTSTRAP_SBATCH_ARGS=()
BPO_RANK_SBATCH_ARGS=()
BPO_TRAIN_SBATCH_ARGS=()
BPO_EVALUATE_SBATCH_ARGS=()
BPO_COMMAND_SBATCH_ARGS=()
BPO_SRUN_ARGS=()
BPO_CONTAINER_ARGS=()

# A start that lost a task earlier than this is not requeued: the next one would most likely fail too.
BPO_CRASH_REQUEUE_AFTER_S="${BPO_CRASH_REQUEUE_AFTER_S:-600}"

inside_job() { [[ -n "${SLURM_JOB_ID:-}" ]]; }

load_site() {
    if [[ -f "$root/slurm/site.env" ]]; then
        # Site files are written for interactive shells and may use unset variables.
        set +u
        # shellcheck source=/dev/null
        source "$root/slurm/site.env"
        set -u
    fi
}

# split_arguments [SBATCH_OPTION... --] [ARGUMENT...]: sets `options` and `arguments`.
split_arguments() {
    local position
    options=() arguments=("$@")
    for ((position = 1; position <= $#; position++)); do
        if [[ "${!position}" == -- ]]; then
            options=("${@:1:position-1}") arguments=("${@:position+1}")
            break
        fi
    done
}

# submit SCRIPT [SBATCH_OPTION...] -- [ARGUMENT...]: prints the job's id. Options given here override the site's, which
# override the script's own.
submit() {
    local script="$1" id
    shift
    split_arguments "$@"
    case "$script" in
        bootstrap.sh) options=("${BPO_BOOTSTRAP_SBATCH_ARGS[@]}" "${options[@]}") ;;
        rank.sh) options=("${BPO_RANK_SBATCH_ARGS[@]}" "${options[@]}") ;;
        train.sh) options=("${BPO_TRAIN_SBATCH_ARGS[@]}" "${options[@]}") ;;
        evaluate.sh) options=("${BPO_EVALUATE_SBATCH_ARGS[@]}" "${options[@]}") ;;
        command.sh) options=("${BPO_COMMAND_SBATCH_ARGS[@]}" "${options[@]}") ;;
    esac
    id=$(BPO_ROOT="$root" sbatch --parsable "${BPO_SBATCH_ARGS[@]}" "${options[@]}" "$root/slurm/$script" \
        "${arguments[@]}") || return
    echo "${id%%;*}" # a federation adds `;cluster`
}

# Until `end_chain`, the jobs that `chain` has submitted are cancelled if the script ends.
start_chain() {
    submitted=()
    trap cancel_chain EXIT
}

cancel_chain() {
    ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
    echo "error: not all jobs could be submitted; the submitted ones have been cancelled" >&2
}

end_chain() { trap - EXIT; }

# chain SCRIPT [SBATCH_OPTION...] -- [ARGUMENT...]: submits a job that starts after the previous one of the chain has
# succeeded, and is cancelled if that one fails. Adds its id to `submitted`.
chain() {
    local script="$1" after=() id
    shift
    if ((${#submitted[@]})); then
        after=("--dependency=afterok:${submitted[-1]}" --kill-on-invalid-dep=yes)
    fi
    id=$(submit "$script" "${after[@]}" "$@")
    submitted+=("$id")
}

# Sets working directory, site settings, interpreter and addresses.
enter_job() {
    cd "$SLURM_SUBMIT_DIR" || exit
    # May be inherited from a shell in another job, from which this one was submitted.
    unset RANK WORLD_SIZE LOCAL_RANK MASTER_PORT
    load_site
    use_venv
    # Quoted, because the shell would expand a node list such as gpu[01-04] as a pattern.
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR="${nodes%%$'\n'*}"
    export PYTHONUNBUFFERED=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    # Since SLURM 22.05 srun does not inherit this from sbatch.
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    restarts="${SLURM_RESTART_COUNT:-0}"
    # The job id for `scontrol requeue`: for an array task, SLURM_JOB_ID alone may refer to all tasks of the array.
    job="$SLURM_JOB_ID"
    if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
        job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    fi
    echo "[$(date -Is)] job $job, restart $restarts, ${SLURM_NTASKS:-1} tasks on: ${nodes//$'\n'/ }"
}

use_venv() {
    if [[ "${BPO_CONTAINER:-none}" == none && -d "$root/.venv/bin" ]]; then
        export PATH="$root/.venv/bin:$PATH" # also has ninja, for the operations DeepSpeed compiles at first use
    fi
    # Otherwise the folder of the program comes first on sys.path and may hide installed packages.
    export PYTHONSAFEPATH=1
}

# Sets `shard`, the place of this task in its array.
array_shard() {
    # shellcheck disable=SC2153 # set by Slurm
    shard=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP))
    if ((shard >= SLURM_ARRAY_TASK_COUNT)); then
        echo "error: --array must be a range such as 0-7; of the list given here no task can tell its place" >&2
        exit 2
    fi
}

# in_container PYTHON_ARGUMENT...: sets `program`, the command line, and `container`, srun's options for it.
in_container() {
    program=("${BPO_PYTHON:-python}" "$@")
    container=()
    case "${BPO_CONTAINER:-none}" in
        none) ;;
        pyxis)
            container=(--container-image="$BPO_CONTAINER_IMAGE" --container-workdir="$PWD"
                --container-mounts="${BPO_CONTAINER_MOUNTS:-$PWD:$PWD}" "${BPO_CONTAINER_ARGS[@]}")
            ;;
        apptainer)
            program=(apptainer exec --nv --pwd "$PWD" --bind "${BPO_CONTAINER_MOUNTS:-$PWD:$PWD}"
                "${BPO_CONTAINER_ARGS[@]}" "$BPO_CONTAINER_IMAGE" "${program[@]}")
            ;;
        *)
            echo "error: BPO_CONTAINER is $BPO_CONTAINER; slurm/site.env may set it to none, pyxis or apptainer" >&2
            exit 2
            ;;
    esac
}

# run_here PYTHON_ARGUMENT...: runs a short program and prints its output. Only srun starts a container of pyxis, in a
# job of its own.
run_here() {
    local program container
    use_venv
    in_container "$@"
    if ((${#container[@]})); then
        program=(srun "${BPO_SBATCH_ARGS[@]}" "${BPO_COMMAND_SBATCH_ARGS[@]}" --ntasks=1 --output=all
            "${container[@]}" "${program[@]}")
    fi
    "${program[@]}"
}

# launch PYTHON_ARGUMENT...: one process per task, without a launcher (one that receives the scheduler's signal dies and
# orphans its workers). Sets `code`.
#
# --kill-on-bad-exit=0, because ranks that stop on a signal exit one after another with code 75: otherwise the first
# exit would kill the others, and srun would report that. If a rank dies, the others have --wait seconds to report it.
launch() {
    local program container
    in_container "$@"
    code=0
    srun --kill-on-bad-exit=0 --wait=120 --mpi=none "${container[@]}" "${BPO_SRUN_ARGS[@]}" "${program[@]}" || code=$?
}

# finish CODE: requeues the job if another start would make progress; exits with CODE (see bpo/job/signals.py).
finish() {
    local code="$1" again=false why
    case "$code" in
        0) why="finished" ;;
        74) why="its results cannot be written; free disk space, then start it again" ;;
        75) why="stopped by a signal, results so far are kept" again=true ;;
        138 | 140 | 143) why="killed by SIGUSR1, SIGUSR2 or SIGTERM before its signal handlers were set" again=true ;;
        93) why="restarts make no progress; see the log above" ;;
        *)
            why="failed; see the log above"
            if ((code == 76 || code > 128)); then
                why="a task was lost"
                ((SECONDS < BPO_CRASH_REQUEUE_AFTER_S)) || again=true
            fi
            ;;
    esac
    echo "[$(date -Is)] job $job ended with code $code after $SECONDS s: $why"
    if $again && ! scontrol requeue "$job"; then
        echo "error: the cluster does not requeue job $job; submit it again (training: with --train.resume true)" >&2
    fi
    exit "$code"
}
