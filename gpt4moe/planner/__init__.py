"""Room `planner`, storey 2: predict numbers. May import config, parallel. No torch, no megatron, no deepspeed.

tensors.py            every tensor of a model: name, shape, cut
params.py             parameters: whole, active, of a rank
flops.py              operations of a token, row by row
gradient_buffers.py   Megatron's packing, owned shares
zero_partition.py     DeepSpeed's packing, owned shares
activations.py        saved tensors of a micro-batch
workspace.py          what comes and goes
state_bytes.py        bytes of a parameter's states
memory.py             the fullest rank, stage by stage
communication.py      bytes a rank sends, group by group
pipeline.py           a step's schedule: idle time, activations held
efficiency.py         constants of stacks and generations
layer_time.py         seconds of one layer
step_time.py          seconds of a step
estimate.py           all of one plan, JSON
inference.py          serving: cache, latency, money
leak.py               reported numbers, claim by claim
calibrate.py          predicted against measured
glance.py             a lower bound of memory
candidates.py         legal layouts, fastest first
search.py             the best that fit, money
search_cure.py        where none fits: changes, tried
cure.py               legal changes, tried
report.py             tables for people
answer.py             what a plan asks for
bottleneck.py         what binds, what to know
run_time.py           days, with saves and failures
cost.py               money and energy

Arithmetic alone: a login node runs it in milliseconds. Each formula is held against built objects or published numbers.
"""
