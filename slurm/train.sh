#!/usr/bin/env bash
# Trains on the nodes and tasks that sbatch's flags ask for, one task per rank:
#
#     sbatch --nodes=2 --ntasks-per-node=8 slurm/train.sh +experiment=gpt4 run.name=first
#     bash slurm/train.sh --nodes=2 --ntasks-per-node=8 +experiment=gpt4 run.name=first     # submits itself
#
# The trainer's output goes to <run folder>/logs/<job>-<restart>.log, this script's own to slurm-<job>.log.
# Two minutes before the time limit Slurm sends USR1 here; every rank gets it, saves and ends with 85, and the job
# goes back into the queue. A restart gets the same arguments and goes on from the run folder.
#
#SBATCH --job-name=gpt4moe
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

refuse() { # cause, cure
    printf '%s\n%s\n' "$1" "$2" >&2
    exit 2
}

name='' folder_root=runs options=() overrides=()
for argument in "$@"; do
    case $argument in
        -*) options+=("$argument") ;;
        *) overrides+=("$argument") ;;
    esac
    case ${argument#"${argument%%[!+]*}"} in # without leading + signs
        run.name=*) name=${argument#*=} ;;
        run.root=*) folder_root=${argument#*=} ;;
    esac
done
[ -n "$name" ] || refuse "run.name is not set." "Add run.name=first."

if [ -z "${SLURM_JOB_ID:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    . slurm/cluster.env
    exec sbatch "${options[@]}" slurm/train.sh "${overrides[@]}"
fi

# In a job this file is a copy in Slurm's spool: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
[ -f slurm/cluster.env ] || refuse "$PWD is no checkout: it has no slurm/cluster.env." "Call sbatch in the checkout."
[ ${#options[@]} -eq 0 ] || refuse "${options[*]} came after the script's name." "Put sbatch's options before it."
. slurm/cluster.env

# Node names need not be known to DNS, addresses are.
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
logs=$folder_root/$name/logs
mkdir -p "$logs"
echo "Job $SLURM_JOB_ID, start $restart, on $SLURM_JOB_NODELIST: $logs/$SLURM_JOB_ID-$restart.log"

# Without a step yet there is nobody to tell: the signal is then lost on purpose, and the time limit ends the job.
signalled=''
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID" || true' USR1

# --wait: a rank that ended early takes the others with it, but has given them time to save and end with 85 too.
srun --wait=120 --open-mode=append --output="$logs/$SLURM_JOB_ID-$restart.log" \
    "${container[@]}" "$python" -m gpt4moe.train "${overrides[@]}" &
step=$!
while true; do
    signalled='' status=0
    wait "$step" || status=$?
    [ -n "$signalled" ] || break # a wait that a signal cut short does not tell srun's status
done

echo "Job $SLURM_JOB_ID, start $restart, ended with $status."
if [ "$status" -eq 85 ]; then # saved, please requeue
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
