#!/usr/bin/env bash
# Runs one rank: srun starts it on every task (run_ranks of prologue.sh), and it starts the container and the program:
#
#     bash slurm/rank.sh LINK COMMAND...
#
# It does what the program cannot do itself:
# - USR1 and USR2 do not kill the program before it has handlers: containers and Python take a moment to begin;
# - it keeps the rank on the cores and the memory of the NUMA node that its GPU belongs to;
# - it lets NCCL note its last collectives, so that a hang shows which rank did not come (the flight recorder);
# - it records which rank failed first and caused the failure of the others: LINK then points to "1: rank 0 on node1".
#   srun returns the highest status of all ranks, which may be that of a rank that srun killed after --wait.
# Exit status: the command's; 128 + N when signal N killed it.
set -uo pipefail
first_failure=$1
shift
# What CUDA and torch read once, when they start (parallel/environment.py sets them too, where no job script runs).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# NCCL notes its last collectives and, when one has waited too long, writes them beside the logs, a file for each rank.
# Read them with torch's tool: python -m torch.distributed.flight_recorder.fr_trace.
[ -n "${TORCH_NCCL_TRACE_BUFFER_SIZE:-}" ] || export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
[ -z "$first_failure" ] || export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${first_failure%.failed}.nccl_trace_rank_}

sys=${GPT4MOE_SYS:-/sys} # another one in tests

tasks_on_node() { # SLURM_STEP_TASKS_PER_NODE is like 8(x2),4: two nodes of 8 tasks and one of 4
    local part times nodes=0
    local parts=${SLURM_STEP_TASKS_PER_NODE:-1}
    for part in ${parts//,/ }; do
        times=1
        [[ $part != *x* ]] || times=${part#*x}
        times=${times%")"}
        nodes=$((nodes + times))
        if [ "${SLURM_NODEID:-0}" -lt "$nodes" ]; then
            echo "${part%%"("*}"
            return
        fi
    done
}

numa_node_of_gpu() { # prints nothing if there is no GPU, or if the machine does not know
    local bus gpu=${SLURM_LOCALID:-0} node visible
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-}"
    case ${#visible[@]} in
        0) ;;
        1) gpu=${visible[0]} ;; # srun has chosen a GPU for each task
        *) gpu=${visible[$gpu]:-$gpu} ;;
    esac
    bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader -i "$gpu" 2>/dev/null) || return
    bus=${bus#0000} # the driver writes the domain with 8 digits, the kernel with 4
    read -r node 2>/dev/null <"$sys/bus/pci/devices/${bus,,}/numa_node" || return
    [ "$node" -lt 0 ] || echo "$node"
}

# Sets `bound`: the command that keeps the rank on its NUMA node. Empty where Slurm has bound the task already, where
# there is one node or one task, or where neither numactl nor taskset is installed.
bound=()
bind_to_numa_node() {
    local tasks node cores allowed online nodes
    nodes=$(find "$sys/devices/system/node" -maxdepth 1 -name 'node[0-9]*' 2>/dev/null | wc -l)
    tasks=$(tasks_on_node)
    [ "$nodes" -gt 1 ] && [ "${tasks:-1}" -gt 1 ] || return
    allowed=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
    read -r online <"$sys/devices/system/cpu/online" || return
    [ "$allowed" = "$online" ] || return
    node=$(numa_node_of_gpu)
    node=${node:-$((${SLURM_LOCALID:-0} * nodes / tasks))}
    read -r cores 2>/dev/null <"$sys/devices/system/node/node$node/cpulist" && [ -n "$cores" ] || return
    if command -v numactl >/dev/null; then
        bound=(numactl "--cpunodebind=$node" "--preferred=$node")
    elif command -v taskset >/dev/null; then
        bound=(taskset --cpu-list "$cores")
    fi
}
[ "${GPT4MOE_BIND:-yes}" = no ] || bind_to_numa_node

trap '' USR1 USR2 # the command inherits this
trap : TERM       # Slurm sends it to this shell too, which must wait for the end of the command

"${bound[@]}" "$@"
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
