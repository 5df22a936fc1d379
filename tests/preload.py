"""What the fork server of tests/spawn.py loads once for all ranks. They run on CPUs, also where there is a GPU."""

import gc
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; several ranks on one GPU are not what NCCL allows
os.environ.setdefault("DS_ACCELERATOR", "cpu")

warnings.filterwarnings("ignore")

import matplotlib.figure  # noqa: E402, F401

import gpt4moe.train  # noqa: E402
import gpt4moe.training.build  # noqa: E402, F401
from gpt4moe.config.load import load_run_config  # noqa: E402

# Hydra's parser and its tables of types are made at the first load: here once for all ranks.
load_run_config(["+experiment=tiny", "run.name=preload"])

# A collection in a forked rank then passes over what was imported here: a quarter of the time of a short run.
gc.collect()
gc.freeze()
