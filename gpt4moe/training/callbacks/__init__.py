"""Features at the loop's edges, one a file; build.build_callbacks lists them in the order they run.

events.py       events.jsonl: start, first step, stop; the pauses of the others
wire.py         bytes sent in the first step of a start
replicas.py     copies on several ranks still equal to the bit
evaluation.py   loss on held-out text, added to the record
preemption.py   a signal -> save and end with 85 after this step; peak memory in the same all-reduce
resources.py    MFU, device hours and money, time left, added to the record
tracking.py     metrics.jsonl, console, wandb
alerts.py       a spike, a dead expert, a hang: told on console, as event, by wandb
checkpoints.py  every so many steps, at the end, when asked to stop
report.py       loss.png and report.html at the end
"""
