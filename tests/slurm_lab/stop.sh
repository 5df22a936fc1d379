#!/usr/bin/env bash
# Cancels the jobs of the lab in the folder given and stops its daemons: those of its pid files, nothing by name.
set -euo pipefail
lab=${1:?folder}
export SLURM_CONF=$lab/slurm.conf
timeout 10 scancel --user "$(id -un)" || true
for ((try = 0; try < 40; try++)); do # jobs end before the daemons that must clean up after them
    [ -n "$(timeout 10 squeue -h || true)" ] || break
    sleep 0.25
done
for file in "$lab"/run/slurmd-*.pid "$lab"/run/slurmctld.pid "$lab"/run/munged.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    case $(cat "/proc/$pid/comm" 2>/dev/null || true) in munged | slurmd | slurmctld) ;; *) continue ;; esac
    kill "$pid"
    for ((try = 0; try < 50; try++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
done
