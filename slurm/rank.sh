#!/usr/bin/env bash
# One rank, as srun starts it on every task (run_ranks of prologue.sh), around its container and program:
#
#     bash slurm/rank.sh FILE COMMAND...
#
# It does what only somebody outside the program can:
# - USR1 and USR2 do not kill a program that has no handlers yet: containers and Python take moments to begin;
# - the first rank of a job to fail notes its exit status in FILE. srun tells the highest of all, and that may be of a
#   rank that it killed itself, because it waited in vain for the one that had failed.
# Exit status: the command's; 128 + N when signal N killed it.
set -uo pipefail
first_failure=$1
shift
trap '' USR1 USR2 # the command inherits that
trap : TERM       # Slurm sends it to this shell too, which must see the end of the command

"$@"
status=$?
if [ "$status" -ne 0 ] && [ ! -e "$first_failure" ]; then
    # Where a rank is killed, the others fail within moments: it is not they who were first.
    [ "$status" -eq 85 ] || [ "$status" -gt 128 ] || sleep 2
    set -o noclobber # one rank alone can make the file
    { echo "$status rank ${SLURM_PROCID:-0} on ${SLURMD_NODENAME:-this node}" >"$first_failure"; } 2>/dev/null || true
fi
exit "$status"
