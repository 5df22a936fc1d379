# shellcheck shell=bash
# What every job script of this folder begins with: sourced, from the checkout, inside a job.
#
#     start_job          reads cluster.env, with the site that GPT4MOE_SITE names; sets python, restart, MASTER_ADDR, MASTER_PORT
#     take_overrides "$@"    sets overrides; refuses what looks like sbatch's options
#     run_ranks ARGS...  srun of the job's tasks: one rank each (rank.sh), in the container if there is one
#     await_ranks ARGS...    the same, with traps heard meanwhile; sets status
#     is_cancelled       whether Slurm's TERM is for somebody's scancel

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
            *=* | '~'*) overrides+=("$argument") ;;
            *) refuse "$argument is neither an option nor key=value." "Write --nodes=2, not --nodes 2." ;;
        esac
    done
}

take_overrides() {
    split_arguments "$@"
    [ ${#options[@]} -eq 0 ] || refuse "${options[*]} came after the script's name." "Put sbatch's options before it."
}

start_job() {
    local seen
    seen=$(site_defaults)
    # shellcheck source=slurm/cluster.env
    . slurm/cluster.env
    tell_unseen_defaults "$seen"

    # Node names need not be known to DNS, addresses are.
    local first_node
    read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    restart=${SLURM_RESTART_COUNT:-0}
    # Below the kernel's ephemeral ports; jobs on one node, and a restart, differ.
    export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 101 + restart) % 10000))
    # srun does not inherit sbatch's --cpus-per-task (since 22.05). Not asked for: no limit but the node's.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Ranks come from SLURM_*; a launcher's leftovers in the submitting shell would win over them.
    unset RANK WORLD_SIZE LOCAL_RANK
    python=$venv/bin/python
    [ ${#container[@]} -eq 0 ] || python=python
}

# Names of the exported SBATCH_* variables; the submitting shell's come into the job.
site_defaults() {
    env | sed -n 's/^\(SBATCH_[A-Z_]*\)=.*/\1/p' | sort
}

# A plain sbatch reads them from its shell, and there they are only once somebody has read cluster.env: what it did not
# see is said, unless the job got the same by its command line, or this script does not want it (unwanted_defaults).
unwanted_defaults=()
tell_unseen_defaults() { # names seen when the job was submitted
    local name unseen='' got
    for name in $(comm -13 <(echo "$1") <(site_defaults)); do
        case $name in
            SBATCH_PARTITION | SBATCH_ACCOUNT | SBATCH_QOS | SBATCH_RESERVATION) got=SLURM_JOB_${name#SBATCH_} ;;
            *) got=SLURM_${name#SBATCH_} ;;
        esac
        case " ${unwanted_defaults[*]} " in *" $name "*) continue ;; esac
        [ "${!got:-}" = "${!name}" ] || unseen+=" $name=${!name}"
    done
    [ -z "$unseen" ] || printf '%s\n%s\n' "sbatch did not see these defaults of slurm/cluster.env:$unseen." \
        "Where you want them: . slurm/cluster.env before sbatch, or bash slurm/NAME.sh, which submits itself." >&2
}

# --wait: a rank that ended early takes the others with it, but has given them time to save and end with 85 too; so no
# rank is killed at once because another's status is not 0, whatever the site's default is.
srun_options=() first_failure=''
run_ranks() {
    local word of_srun=() around=()
    for word in "${container[@]}"; do # pyxis is options of srun, anything else a command around the program
        if [ ${#around[@]} -eq 0 ] && [[ $word == -* ]]; then of_srun+=("$word"); else around+=("$word"); fi
    done
    srun --wait=120 --kill-on-bad-exit=0 --open-mode=append "${srun_options[@]}" "${of_srun[@]}" \
        bash slurm/rank.sh "$first_failure" "${around[@]}" "$python" "$@"
}

# A wait that a signal cuts short does not tell the status, nor does the next one where srun ended just then: it comes
# through a pipe, for a disk may be full. Slurm's TERM goes to every process of a job's script, and what waits for srun
# must outlive it: ranks are saving then.
await_ranks() {
    local pipe step
    exec {pipe}<> <(:)
    {
        trap : TERM USR1 USR2
        status=0
        run_ranks "$@" || status=$?
        echo "$status" >&"$pipe"
    } &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
    read -r -t 5 -u "$pipe" status || status=137 # even srun was killed
}

is_cancelled() {
    local job
    job=" $(scontrol show job -o "$SLURM_JOB_ID") "
    case $job in
        *" JobState=RUNNING "*) return 1 ;; # preemption, where the site lets it tell the batch shell too
        *" Reason=TimeLimit "*) return 1 ;;
        *" Restarts=$restart "* | "  ") return 0 ;; # also where Slurm does not answer: never undo a scancel
        *) return 1 ;; # a lost node: Slurm has put the job back
    esac
}
