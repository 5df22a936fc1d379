#!/usr/bin/env bash
# Checks before a run whether the nodes are fit for it. Use as many nodes and tasks as the run will have:
#
#     sbatch --nodes=3120 --ntasks-per-node=8 --time=15 slurm/preflight.sh +experiment=gpt4 time_limit=24:00:00
#     bash slurm/preflight.sh --nodes=2 --ntasks-per-node=8 +experiment=tiny parallel=tp2_pp2_ep2    # submits itself
#
# Arguments are the run's overrides. time_limit= is the time limit of the training job (default: that of this job).
# signal= is --signal of the training job (default: SBATCH_SIGNAL of cluster.env, else that of train.sh). Write --json as
# output=json. The table is in
# preflight-<job>.log. Exit status: 0 fit; 1 a check failed; 2 bad input.
# To go on only when it is fit:  sbatch --dependency=afterok:<job> ... slurm/train.sh ...
#
#SBATCH --job-name=preflight
#SBATCH --output=preflight-%j.log
#SBATCH --no-requeue
set -euo pipefail

# In a job this file is a copy in Slurm's spool: the checkout is where sbatch was called.
[ -n "${SLURM_JOB_ID:-}" ] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f slurm/prologue.sh ]; then
    printf '%s\n' "$PWD is no checkout: it has no slurm/prologue.sh." "Call sbatch in the checkout." >&2
    exit 2
fi
. slurm/prologue.sh

if [ -z "${SLURM_JOB_ID:-}" ]; then
    split_arguments "$@"
    # shellcheck source=slurm/cluster.env
    . slurm/cluster.env
    exec sbatch "${options[@]}" slurm/preflight.sh "${overrides[@]}"
fi

take_overrides "$@"
start_job
if ! time_limit=$(squeue --noheader --job "$SLURM_JOB_ID" --format=%l); then
    echo "squeue did not tell this job's time limit: say time_limit=24:00:00." >&2
    time_limit=
fi
warning=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' slurm/train.sh)}
run_ranks tools/preflight.py "time_limit=$time_limit" "signal=$warning" "${overrides[@]}"
