"""Room `parallel`, storey 1: who computes what. May import config; never model or data.

layout.py          Layout: the rank grid as arithmetic; coordinates, members of each group (no torch)
placement.py       layers -> pipeline stages, experts -> ranks (no torch)
legality.py        is a layout legal, and why not (no torch)
kernel_problems.py do the chosen kernels take the device, dtype and sizes (no torch)
shard.py           Shard: a rectangle of a logical tensor (no torch)
local_ranks.py     run_ranks: a function on gloo ranks (no torch)
rank_processes.py  Ranks: the processes of a launch, watched; whose status counts (no torch)
forked_ranks.py    ranks of a launch that share one process's imports (no torch)
wire.py            bytes on the wire, counted at the collective
handed.py          what a rank gives to collectives: on which rank did two passes part?
slurm_job.py       SlurmJob: what Slurm reports (no torch)
environment.py     rank and world of this process (no torch)
rendezvous.py      how the ranks of a launch find each other, and which has not come
groups.py          ProcessGroups: the live groups
megatron_state.py  the only use of Megatron's parallel_state and random-number trackers
deepspeed_groups.py  the only use of DeepSpeed's communication layer
board.py           short texts that ranks leave for each other, without a collective
agreement.py       if any rank raises, every rank raises
collectives.py     gather and scatter that gradients flow through
cpu_device.py      Megatron on a machine without a GPU
meta_device.py     groups without processes, tensors without memory
support_table.py   which degrees can be combined; makes the table of docs/layouts.md (no torch)
determinism.py     training.deterministic: kernels and sums in one order on GPUs
rng.py             counter-based random numbers: equal on every layout and device
"""
