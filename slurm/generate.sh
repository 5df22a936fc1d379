#!/usr/bin/env bash
# Generates text on the nodes and tasks that sbatch's flags ask for, one task per rank; arguments are those of
# tools/generate.py:
#
#     sbatch --nodes=16 --ntasks-per-node=8 slurm/generate.sh runs/second --tp 8 --pp 16 \
#         --input prompts.jsonl --output answers.jsonl
#     bash slurm/generate.sh --nodes=2 --ntasks-per-node=2 runs/first --tp 2 --pp 2 \
#         --input prompts.jsonl --output answers.jsonl
#
# The second form submits itself: sbatch's options stand before FOLDER.
# A job that Slurm stops (time limit, preemption, lost node) is requeued, at most 20 times, and goes on after the last
# answer in --output. Exit status: 0 done; 2 bad input; 85 or above 128: stopped by a signal.
#
#SBATCH --job-name=generate
#SBATCH --output=generate-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
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
answer_in_job generate "$@"
