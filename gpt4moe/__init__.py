"""gpt4moe: trains GPT-4-shaped mixture-of-experts models on Megatron and DeepSpeed, the same on every layout.

Rooms, lowest storey first. Imports only go down (tests/test_house.py):

   -1  lean_imports.py  Megatron and DeepSpeed without a compiler that no step uses
    0  config        what a run may be: typed, checked, no torch
    1  parallel      who computes what: layouts, legality, live groups, devices
    2  architecture  what a model is made of: tensors, counts, operations; no torch
    2  pipeline      the pipeline schedule as data: slots and messages; no torch
    2  data          the n-th sample, exactly
    2  moe           the expert-parallel MLP: routers, dispatch, experts
    3  chat          conversations as tokens, and which of them are learned; no torch
    3  planner       predicted memory, time, money; search; no torch
    3  model         Megatron GPT chunks, assembled from specs
    3  objectives    what a step minimises: model output and batch in, loss out
    3  corpus        files of text to tokens, checked, on several processes; no torch
    3  media         documents with images to tokens and images, checked
    4  checkpoint    logical tensors on disk, any layout
    4  resilience    limits on automatic restarts; what a signal does to a rank
    4  runlog        the facts of a run: metrics, events, alerts, console, wandb; no torch
    5  training      one step, then the loop; features as callbacks
    5  inference     weights of a checkpoint, sampling
    5  convert       names and shapes to and from Hugging Face, inference shards
    5  launch        preflight: is this cluster fit for this run?
    5  operations    where the runs of a folder stand
    5  pages         pictures and pages for people: report.html, plan pages
    6  demo          corpus, entropies, the story of `make train`
    6  proof         a layout against one process, number by number
    6  rehearsal     every kind of rank of a large world, built without memory
    6  evaluation    loss, questions and benchmark tasks, on any layout
    6  serving       an endpoint of OpenAI's form, for trying a model
    6  gpu_rehearsal two steps of one rank on a fake GPU: what it would refuse, and what bounds its speed
    7  train.py      the guided tour: python -m gpt4moe.train
    7  launch_ranks.py  starts the ranks of one machine
    7  refinement    better texts by search: candidates in turn, scored, the best kept
    8  fork_ranks.py  imports once for all ranks of a machine
    8  drill         faults planted in a small run, and what they cost

A room's `__init__.py` is its sign: its job and its files. `python -m tests.where FILE` tells where a file is tested.
"""

__version__ = "0.1.0"

from gpt4moe import lean_imports

lean_imports.install()
