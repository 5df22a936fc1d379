#!/usr/bin/env bash
# Runs one rank: srun starts it on every task (run_ranks of prologue.sh), and it starts the container and the program:
#
#     bash slurm/rank.sh LINK COMMAND...
#
# It does what the program cannot do itself:
# - USR1 and USR2 do not kill the program before it has handlers: containers and Python take a moment to begin;
# - it records which rank failed first and caused the failure of the others: LINK then points to "1: rank 0 on node1".
#   srun returns the highest status of all ranks, which may be that of a rank that srun killed after --wait.
# Exit status: the command's; 128 + N when signal N killed it.
set -uo pipefail
first_failure=$1
shift
# What CUDA and torch read once, when they start (parallel/environment.py sets them too, where no job script runs).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

trap '' USR1 USR2 # the command inherits this
trap : TERM       # Slurm sends it to this shell too, which must wait for the end of the command

"$@"
status=$?
[ "$status" -ne 0 ] && [ -n "$first_failure" ] || exit "$status"
# The first rank that makes the link counts as the cause. A rank whose failure may be a consequence waits first: when a
# rank is killed (out of memory, kill -9, a memory fault), the others fail within moments. When a rank fails, others abort
# (134: NCCL's watchdog, gloo), some before it has ended, because it closes its connections first.
case $status in
    134) sleep 4 ;;
    85) ;;
    *) [ "$status" -gt 128 ] || sleep 2 ;;
esac
# A link, because only one rank can make it, and because it needs no space on a full disk.
ln -s "$status: rank ${SLURM_PROCID:-0} on ${SLURMD_NODENAME:-this node}" "$first_failure" 2>/dev/null
exit "$status"
