"""Room `parallel`, storey 1: who computes what. May import config; never model or data.

layout.py          Layout: the rank grid as arithmetic; coordinates, members of each group (no torch)
placement.py       layers -> pipeline stages, experts -> ranks (no torch)
legality.py        the one function that says whether a layout is legal, and why not (no torch)
shard.py           Shard: a rectangle of a logical tensor (no torch)
wire.py            bytes on the wire, counted at the collective
environment.py     rank, world, device and backend from Slurm, torchrun or nothing
groups.py          ProcessGroups: the live groups, handed on by argument
megatron_state.py  embassy: Megatron's parallel_state and random-number trackers
deepspeed_groups.py  embassy: DeepSpeed's communication layer, as its expert-parallel parts need it
agreement.py       if any rank raises, every rank raises
collectives.py     gather and scatter that gradients flow through
cpu_device.py      Megatron on a machine without a GPU
rng.py             counter-based random numbers: equal on every layout and device
"""
