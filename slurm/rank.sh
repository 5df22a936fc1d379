#!/usr/bin/env bash
# One rank, as srun starts it on every task (run_ranks of prologue.sh), around its container and program:
#
#     bash slurm/rank.sh LINK COMMAND...
#
# It does what only somebody outside the program can:
# - USR1 and USR2 do not kill a program that has no handlers yet: containers and Python take moments to begin;
# - the rank whose failure is the cause of the others' notes its exit status: LINK then points to "1: rank 0 on node1".
#   srun tells the highest status of all, and that may be of a rank that it killed itself, because it waited in vain.
# Exit status: the command's; 128 + N when signal N killed it.
set -uo pipefail
first_failure=$1
shift
trap '' USR1 USR2 # the command inherits that
trap : TERM       # Slurm sends it to this shell too, which must see the end of the command

"$@"
status=$?
[ "$status" -ne 0 ] && [ -n "$first_failure" ] || exit "$status"
# The first to end is the cause, but for those that give others time to be it. Where a rank was killed (out of memory,
# kill -9, a fault in memory), the others fail within moments. Where one failed or was killed, others abort (134: NCCL's
# watchdog, gloo), some even before it has quite ended: it closes its connections first.
case $status in
    134) sleep 4 ;;
    85) ;;
    *) [ "$status" -gt 128 ] || sleep 2 ;;
esac
# A link can be made once, by one rank alone, and also where the disk is full.
ln -s "$status: rank ${SLURM_PROCID:-0} on ${SLURMD_NODENAME:-this node}" "$first_failure" 2>/dev/null
exit "$status"
