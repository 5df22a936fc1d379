# shellcheck shell=bash
# What every job script of this folder begins with: sourced, from the checkout, inside a job.
#
#     start_job          reads cluster.env; sets python, restart, MASTER_ADDR, MASTER_PORT
#     take_overrides "$@"    sets overrides; refuses what looks like sbatch's options
#     run_ranks ARGS...  srun of the job's tasks: one rank each, in the container if there is one

refuse() { # cause, cure
    printf '%s\n%s\n' "$1" "$2" >&2
    exit 2
}

# Words that begin with - go to sbatch, the others to the program.
split_arguments() {
    options=() overrides=()
    local argument
    for argument in "$@"; do
        case $argument in
            -*) options+=("$argument") ;;
            *) overrides+=("$argument") ;;
        esac
    done
}

take_overrides() {
    split_arguments "$@"
    [ ${#options[@]} -eq 0 ] || refuse "${options[*]} came after the script's name." "Put sbatch's options before it."
}

start_job() {
    # shellcheck source=slurm/cluster.env
    . slurm/cluster.env

    # Node names need not be known to DNS, addresses are.
    local first_node
    read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    restart=${SLURM_RESTART_COUNT:-0}
    # Below the kernel's ephemeral ports; jobs on one node, and a restart, differ.
    export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))
    # srun does not inherit sbatch's --cpus-per-task (since 22.05). Not asked for: no limit but the node's.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Ranks come from SLURM_*; a launcher's leftovers in the submitting shell would win over them.
    unset RANK WORLD_SIZE LOCAL_RANK
    python=$venv/bin/python
    [ ${#container[@]} -eq 0 ] || python=python
}

# --wait: a rank that ended early takes the others with it, but has given them time to save and end with 85 too.
srun_options=()
run_ranks() {
    srun --wait=120 --open-mode=append "${srun_options[@]}" "${container[@]}" "$python" "$@"
}
