# shellcheck shell=bash
# Functions of the job scripts of this folder. Source it in the checkout.
#
#     start_job          reads cluster.env, with the site that GPT4MOE_SITE names; sets python, restart, MASTER_ADDR, MASTER_PORT
#     take_overrides "$@"    sets overrides; refuses what looks like sbatch's options
#     leading_options "$@"   sets options, up to the first argument without a -, and arguments, the others
#     run_ranks ARGS...  srun of the job's tasks: one rank each (rank.sh), in the container if there is one
#     await_ranks ARGS...    the same, but traps run while it waits; sets status and failure, the rank that caused it
#     is_cancelled       whether Slurm sent TERM because somebody called scancel
#     run_until_done NAME ARGS...   await_ranks of a program that goes on where it was; requeues the job if it was stopped
#     answer_in_job NAME "$@"       the whole job of tools/NAME.py, which writes --output; submits itself outside a job

refuse() { # cause, cure
    printf '%s\n%s\n' "$1" "$2" >&2
    exit 2
}

# Arguments that begin with - are for sbatch, the others for the program.
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

leading_options() {
    options=()
    while [[ ${1:-} == -* ]]; do
        options+=("$1")
        shift
    done
    arguments=("$@")
}

start_job() {
    local seen
    seen=$(site_defaults)
    # shellcheck source=slurm/cluster.env
    . slurm/cluster.env
    tell_unseen_defaults "$seen"

    # An address, because DNS may not know the names of nodes.
    local first_node
    read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    restart=${SLURM_RESTART_COUNT:-0}
    # Below the ephemeral ports. Jobs on one node, and restarts, have different ports.
    export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 101 + restart) % 10000))
    # srun does not inherit sbatch's --cpus-per-task (since Slurm 22.05). If it was not given, there is no limit.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Ranks come from SLURM_*. These variables, left over in the submitting shell, would be used instead.
    unset RANK WORLD_SIZE LOCAL_RANK
    python=$venv/bin/python
    [ ${#container[@]} -eq 0 ] || python=python
}

# Names of the exported SBATCH_* variables. A job has those of the submitting shell.
site_defaults() {
    env | sed -n 's/^\(SBATCH_[A-Z_]*\)=.*/\1/p' | sort
}

# sbatch reads SBATCH_* from its shell, which has those of cluster.env only if somebody sourced that file. This names the
# variables that sbatch did not see, except those whose value the job has anyway, by its command line, and those of
# unwanted_defaults.
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

# --wait: when a rank has ended, the others have this many seconds to save and end with 85 too; then srun kills them.
# --kill-on-bad-exit=0: srun does not kill them at once when a status is not 0, whatever the site's default is.
srun_options=() first_failure=''
run_ranks() {
    local word of_srun=() around=()
    for word in "${container[@]}"; do # pyxis: options of srun; anything else: a command that runs the program
        if [ ${#around[@]} -eq 0 ] && [[ $word == -* ]]; then of_srun+=("$word"); else around+=("$word"); fi
    done
    srun --wait=120 --kill-on-bad-exit=0 --open-mode=append "${srun_options[@]}" "${of_srun[@]}" \
        bash slurm/rank.sh "$first_failure" "${around[@]}" "$python" "$@"
}

# If a signal interrupts `wait`, it does not return the status; and if srun ended just then, the next `wait` does not
# either. So the status comes through a pipe (not a file, because a disk may be full). Slurm sends TERM to every process
# of the script. The subshell that waits for srun ignores it, because the ranks are saving then.
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
    # What rank.sh noted. srun's own status may be that of a rank that it killed after --wait.
    failure=''
    [ -z "$first_failure" ] || failure=$(readlink "$first_failure") || true
    [ -z "$failure" ] || status=${failure%%:*}
    rm -f "$first_failure" || true
}

is_cancelled() {
    local job
    job=" $(scontrol show job -o "$SLURM_JOB_ID") "
    case $job in
        *" JobState=RUNNING "*) return 1 ;; # preemption, at a site that signals the batch shell too
        *" Reason=TimeLimit "*) return 1 ;;
        *" Restarts=$restart "* | "  ") return 0 ;; # also if Slurm does not answer: a scancel must not be undone
        *) return 1 ;; # a lost node: Slurm has requeued the job
    esac
}

# For programs whose finished work is always on disk: nothing is lost when they are killed, and the next start goes on.
# KILL and not TERM, because a rank that waits in a collective of a GPU does not hear TERM.
# 85: stopped by a signal, please requeue. Above 128: a signal killed a rank. Any other status ends
# the job, and 130, which is Ctrl-C.
most_restarts=20
run_until_done() { # name of the job's files; program and arguments
    first_failure=$1-$SLURM_JOB_ID-$restart.failed
    shift
    stopped='' cancelled=''
    trap 'stopped=yes; scancel --signal=KILL "$SLURM_JOB_ID.0" || true' USR1
    trap '! is_cancelled || cancelled=yes' TERM
    await_ranks "$@"
    trap '' TERM # a requeue ends this shell too
    set +e       # if a full disk refuses a message, the exit status must not change
    echo "Job $SLURM_JOB_ID, start $restart, ended with ${failure:-$status}."
    if [ -z "$cancelled" ] && [ "$status" -ne 130 ] &&
        { [ -n "$stopped" ] || [ "$status" -eq 85 ] || [ "$status" -gt 128 ]; }; then
        if [ "$restart" -ge "$most_restarts" ]; then
            echo "It has started $((restart + 1)) times: give it more time (--time) or memory (--mem)." >&2
        else
            scontrol requeue "$SLURM_JOB_ID" || echo "Slurm does not requeue this job: submit it again." >&2
        fi
    fi
    exit "$status"
}

answer_in_job() { # name of the script and of the tool, arguments of the script
    local name=$1
    shift
    leading_options "$@"
    case " ${arguments[*]} " in
        *" --output "* | *" --output="*) ;;
        *) refuse "--output is missing: a stopped job would begin again." "Add --output answers.jsonl." ;;
    esac
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        # shellcheck source=slurm/cluster.env
        . slurm/cluster.env
        exec sbatch "${options[@]}" "slurm/$name.sh" "${arguments[@]}"
    fi
    [ ${#options[@]} -eq 0 ] || refuse "${options[*]} came before FOLDER." \
        "Write FOLDER first, then the tool's options; sbatch's go before slurm/$name.sh."
    start_job
    run_until_done "$name" "tools/$name.py" "${arguments[@]}"
}
