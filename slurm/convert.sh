#!/usr/bin/env bash
# Converts a checkpoint in a job of one task, which needs no GPU; arguments are those of tools/convert_checkpoint.py:
#
#     sbatch --mem=64G slurm/convert.sh to-hf runs/first exported --max-shard-size 5GB
#     bash slurm/convert.sh --mem=64G to-inference runs/first served --tp 8 --pp 16    # submits itself: sbatch's options
#                                                                                      # before the sub-command
# Submitting itself, it asks for no GPU and goes to cpu_partition of slurm/cluster.env.
# A job that Slurm stops (time limit, preemption, lost node) is requeued and continues with the files that are not
# finished. The folder gets its final name when all files are finished. Exit status: the program's.
#
#SBATCH --job-name=convert
#SBATCH --output=convert-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@60
set -euo pipefail

# In a job this file is a copy in Slurm's spool: the checkout is where sbatch was called.
[ -n "${SLURM_JOB_ID:-}" ] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f slurm/prologue.sh ]; then
    printf '%s\n' "$PWD is no checkout: it has no slurm/prologue.sh." "Call sbatch in the checkout." >&2
    exit 2
fi
. slurm/prologue.sh

unwanted_defaults=(SBATCH_GPUS SBATCH_GPUS_PER_NODE SBATCH_GPUS_PER_TASK SBATCH_GRES)
submit() {
    leading_options "$@"
    # shellcheck source=slurm/cluster.env
    . slurm/cluster.env
    unset "${unwanted_defaults[@]}"
    [ -z "$cpu_partition" ] || export SBATCH_PARTITION=$cpu_partition
    exec sbatch "${options[@]}" slurm/convert.sh "${arguments[@]}"
}
[ -n "${SLURM_JOB_ID:-}" ] || submit "$@"

start_job
srun_options=(--nodes=1 --ntasks=1)
run_until_done convert tools/convert_checkpoint.py "$@"
