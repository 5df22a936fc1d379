"""gpt4moe: trains GPT-4-shaped mixture-of-experts models on Megatron and DeepSpeed, the same on every layout.

Rooms, lowest storey first; imports only go down (tests/test_house.py holds it):

    0  config      what a run may be: typed, checked, no torch
    1  parallel    who computes what: layouts, groups, devices
    2  moe data planner   the expert-parallel MLP; the n-th sample, exactly; predicted numbers
    3  model       Megatron GPT chunks assembled from specs; the table of parameters
    4  checkpoint telemetry     logical tensors on disk; metrics, console, wandb, report
    5  training demo            one step, then the loop; what `make data` and `make train` add
    6  proof       a layout against one process, number by number
    6  train.py    the guided tour: python -m gpt4moe.train
"""

__version__ = "0.1.0"
