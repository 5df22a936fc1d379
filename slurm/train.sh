#!/usr/bin/env bash
# Trains on the nodes and tasks that sbatch's flags ask for, one task per rank:
#
#     sbatch --nodes=2 --ntasks-per-node=8 slurm/train.sh +experiment=tiny parallel=tp2_pp2_ep2 run.name=first
#     sbatch --nodes=3120 --ntasks-per-node=8 slurm/train.sh +experiment=gpt4 run.name=second
#     bash slurm/train.sh --nodes=2 --ntasks-per-node=2 +experiment=tiny run.name=third     # submits itself
#     bash slurm/train.sh --chain=5 --nodes=2 ...      # five jobs, one after another: for sites without requeue
#
# The trainer's output goes to <run folder>/logs/<job>-<restart>.log, this script's own to slurm-<job>.log.
# Two minutes before the time limit (--signal) Slurm sends USR1 to this script. It sends USR2 to every rank. The ranks
# save and end with 85, and the job is requeued. A job is also requeued if a signal killed a rank (out of memory, kill -9),
# and if ranks hung (86).
# A restart runs the config of the job's last start and continues from the run's last checkpoint. resilience.* limits
# restarts; most_early_ends below limits starts that end before the trainer could count them.
# To save now and go on:  scancel --signal=USR1 JOB
#
#SBATCH --job-name=gpt4moe
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

# In a job this file is a copy in Slurm's spool: the checkout is where sbatch was called.
[ -n "${SLURM_JOB_ID:-}" ] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f slurm/prologue.sh ]; then
    printf '%s\n' "$PWD is no checkout: it has no slurm/prologue.sh." "Call sbatch in the checkout." >&2
    exit 2
fi
. slurm/prologue.sh
. slurm/starts.sh

name='' folder_root=runs
for argument in "$@"; do
    case ${argument#"${argument%%[!+]*}"} in # without leading + signs
        run.name=*) name=${argument#*=} ;;
        run.root=*) folder_root=${argument#*=} ;;
    esac
done
[ -n "$name" ] || refuse "run.name is not set." "Add run.name=first."
# Before any folder is made; config/training.py has the same rule. A run that has a folder may have an older name.
(
    LC_ALL=C
    [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9_.,=+@-]{0,127}$ ]] ||
        [[ $name =~ ^[^/.][^/]*$ && -f $folder_root/$name/resolved.yaml ]]
) || refuse "run.name=$(printf %q "$name") cannot name a folder." \
    "Use letters, digits and - _ . , = + @, 128 at most; begin with a letter, a digit or _."

# A chain: every job waits for the end of the job before it, and checks how that ended (starts.sh).
submit() {
    local argument answer link chain=1 options_left=() previous=()
    split_arguments "$@"
    . slurm/cluster.env
    for argument in "${options[@]}"; do
        case $argument in
            --chain=*) chain=${argument#*=} ;;
            *) options_left+=("$argument") ;;
        esac
    done
    [[ $chain =~ ^[1-9][0-9]*$ ]] || refuse "--chain=$chain is no number of jobs." "Write --chain=5."
    for ((link = 0; link < chain; link++)); do
        export GPT4MOE_CHAIN_LINK=$link
        answer=$(sbatch --parsable "${previous[@]}" "${options_left[@]}" slurm/train.sh "${overrides[@]}")
        export GPT4MOE_CHAIN_PREVIOUS=${answer%%;*}
        export GPT4MOE_CHAIN_JOBS="${GPT4MOE_CHAIN_JOBS:-} $GPT4MOE_CHAIN_PREVIOUS"
        previous=("--dependency=afterany:$GPT4MOE_CHAIN_PREVIOUS")
        echo "Submitted batch job $GPT4MOE_CHAIN_PREVIOUS"
    done
}
if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit "$@"
    exit
fi

take_overrides "$@"
start_job
set +e # from here on: if a full disk refuses a message or note, the exit status must not change
begin_start "$folder_root/$name"
srun_options=("--output=$logs/$SLURM_JOB_ID-$restart.log")
first_failure=$logs/$SLURM_JOB_ID-$restart.failed
most_early_ends=3
echo "Job $SLURM_JOB_ID, start $restart, on $SLURM_JOB_NODELIST: $logs/$SLURM_JOB_ID-$restart.log"

warner='' cancelled=''
trap '[ -n "$warner" ] || { warn_ranks & warner=$!; }' USR1
# Slurm sends TERM to the batch shell of a job that it stops. The trap keeps it alive until its ranks have saved.
trap '! is_cancelled || { cancelled=yes; note_end stop "job $SLURM_JOB_ID was cancelled"; }' TERM
await_ranks -m gpt4moe.train "${overrides[@]}"
trap '' TERM # a requeue ends this shell too
[ -z "$warner" ] || kill "$warner" 2>/dev/null

echo "Job $SLURM_JOB_ID, start $restart, ended with ${failure:-$status}."
# 85: saved, please requeue. 86: ranks or a disk hung, or ranks were lost. Above 128: a signal killed a rank. The last two saved nothing.
# 130 is no such signal but Ctrl-C, after which the run is to rest.
if [ -n "$cancelled" ]; then
    exit "$status"
elif [ "$status" -ne 85 ] && [ "$status" -ne 86 ] && { [ "$status" -le 128 ] || [ "$status" -eq 130 ]; }; then
    note_end "$([ "$status" -eq 0 ] && echo again || echo stop)" "job $SLURM_JOB_ID ended with $status"
elif count_early_ends && [ "$early" -ge "$most_early_ends" ]; then
    note_end stop "$early starts in a row ended before training began"
    echo "$early starts in a row ended before training began, the last one with $status: no more are made." >&2
    echo "Look at $logs/$SLURM_JOB_ID-$restart.log, mend the cause and submit again." >&2
else
    note_end queued "job $SLURM_JOB_ID was cancelled in the queue"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        note_end again "job $SLURM_JOB_ID ended with $status"
        echo "Slurm does not requeue this job: submit it again, unless a link of its chain goes on." >&2
    fi
fi
exit "$status"
