#!/usr/bin/env bash
# A real Slurm on this one machine: munged, slurmctld and one slurmd per virtual node, on loopback, without systemd.
#
#     tests/slurm_lab/start.sh /tmp/lab [nodes=2] [cpus per node=4] [first port=26800]
#     . /tmp/lab/env.sh        # then sbatch, squeue, scontrol speak to it
#     tests/slurm_lab/stop.sh /tmp/lab
#
# Everything lies in the folder given; ports are first..first+nodes. Tried with Slurm 22.05.
set -euo pipefail
lab=${1:?folder} nodes=${2:-2} cpus=${3:-4} port=${4:-26800}
PATH=$PATH:/usr/sbin
for daemon in munged slurmctld slurmd; do
    command -v "$daemon" >/dev/null || { echo "$daemon is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done
mkdir -p "$lab"/{run,log,state,spool}
lab=$(cd "$lab" && pwd) host=$(hostname -s) user=$(id -un)
(umask 077 && head -c 1024 /dev/urandom >"$lab/munge.key")
echo "CgroupAutomount=no" >"$lab/cgroup.conf"
echo "export SLURM_CONF=$lab/slurm.conf" >"$lab/env.sh"

# No cgroups and no task plugin: neither works in a container. config_overrides: nodes may have more CPUs than the
# machine. No slurmdbd, so no sacct: what became of a job is in log/jobcomp.txt.
cat >"$lab/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$lab/run/munge.socket
CredType=cred/munge
StateSaveLocation=$lab/state
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdPidFile=$lab/run/slurmd-%n.pid
SlurmdLogFile=$lab/log/slurmd-%n.log
SlurmdSpoolDir=$lab/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$lab/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=3,sched_min_interval=200000
ReturnToService=2
KillWait=15
MinJobAge=3600
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus RealMemory=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF=$lab/slurm.conf

munged --force --num-threads=2 --key-file="$lab/munge.key" --socket="$lab/run/munge.socket" \
    --pid-file="$lab/run/munged.pid" --log-file="$lab/log/munged.log" --seed-file="$lab/munge.seed"
slurmctld -f "$SLURM_CONF"
for ((node = 1; node <= nodes; node++)); do
    mkdir -p "$lab/spool/node$node"
    slurmd -f "$SLURM_CONF" -N "node$node"
done
for ((try = 0; try < 120; try++)); do
    idle=$(sinfo -h -t idle -o %D 2>/dev/null || true)
    if [ "$idle" = "$nodes" ]; then exit 0; fi
    sleep 0.25
done
echo "The nodes did not come up:" >&2
tail -n 5 "$lab"/log/*.log >&2
exit 1
