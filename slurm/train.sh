#!/usr/bin/env bash
# Trains on the nodes and tasks that sbatch's flags ask for, one task per rank:
#
#     sbatch --nodes=2 --ntasks-per-node=8 slurm/train.sh +experiment=gpt4 run.name=first
#     bash slurm/train.sh --nodes=2 --ntasks-per-node=8 +experiment=gpt4 run.name=first     # submits itself
#     bash slurm/train.sh --chain=5 --nodes=2 ...      # five jobs, each after the one before: where requeue is off
#
# The trainer's output goes to <run folder>/logs/<job>-<restart>.log, this script's own to slurm-<job>.log.
# Two minutes before the time limit Slurm sends USR1 here; every rank then gets USR2, saves and ends with 85, and the
# job goes back into the queue. So does a job of which a rank died by a signal (out of memory, kill -9). A restart runs
# the config of the run's last start and goes on from its checkpoint; resilience.* says when to give up.
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

name='' folder_root=runs
for argument in "$@"; do
    case ${argument#"${argument%%[!+]*}"} in # without leading + signs
        run.name=*) name=${argument#*=} ;;
        run.root=*) folder_root=${argument#*=} ;;
    esac
done
[ -n "$name" ] || refuse "run.name is not set." "Add run.name=first."

# A chain: every job waits for the end of the one before, however that ended; a finished run ends at once with 0.
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
        previous=("--dependency=afterany:${answer%%;*}")
        echo "Submitted batch job ${answer%%;*}"
    done
}
if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit "$@"
    exit
fi

take_overrides "$@"
start_job
logs=$folder_root/$name/logs
mkdir -p "$logs"
srun_options=("--output=$logs/$SLURM_JOB_ID-$restart.log")
echo "Job $SLURM_JOB_ID, start $restart, on $SLURM_JOB_NODELIST: $logs/$SLURM_JOB_ID-$restart.log"

# Without a step yet there is nobody to tell: the signal is then lost on purpose, and the time limit ends the job.
signalled=''
trap 'signalled=yes; scancel --signal=USR2 "$SLURM_JOB_ID" || true' USR1
# Slurm ends a cancelled job's batch shell too; with the trap it lives on until its ranks have saved.
cancelled=''
trap 'cancelled=yes' TERM

run_ranks -m gpt4moe.train "${overrides[@]}" &
step=$!
while true; do
    signalled='' status=0
    wait "$step" || status=$?
    if [ -n "$cancelled" ] && kill -0 "$step" 2>/dev/null; then continue; fi
    [ -n "$signalled" ] || break # a wait that a signal cut short does not tell srun's status
done

echo "Job $SLURM_JOB_ID, start $restart, ended with $status."
# 85: saved, please requeue. Above 128: a rank died by a signal, and went without saving.
if [ -z "$cancelled" ] && { [ "$status" -eq 85 ] || [ "$status" -gt 128 ]; }; then
    scontrol requeue "$SLURM_JOB_ID" || echo "Slurm does not requeue this job: submit it again." >&2
fi
exit "$status"
