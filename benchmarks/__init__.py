"""Benchmarks: each file is one command, `python -m benchmarks.<name>`, and prints ratios against named baselines.

moe_layer.py       the expert-parallel MLP against plain matrix products and three peers at their best setting
routing.py         the layer and the step under uneven routing, beside the plan: routing_workloads.py (what goes
                   where), routing_ranks.py (what a rank does), routing_plan.py (what the planner says)
training_step.py   a whole training step against Hugging Face Mixtral and Megatron's own MoE
training_ranks.py  the same of two ranks
checkpoints.py     saving, loading and converting in GB/s beside cp
gpt4_checkpoint.py  the tools on a 1.8T checkpoint of headers without data: seconds and memory
telemetry.py       the report of a long run and the list of many: processor seconds, memory
startup.py         seconds from the launch of four ranks to their first step
gpu.py             a bf16 step of a Mixtral-like slice on one GPU: tokens/s, MFU, peak memory
performance.py     runs those beside peers and writes docs/performance.md
harness/           timing in turns, one process's groups, what machine this is
README.md          what was measured, and where
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as gpt4moe/train.py does
