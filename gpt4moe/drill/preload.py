"""Imported once by the fork server, for all warm ranks of a drill. They run on CPUs, also where there is a GPU."""

import gc
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; several ranks on one GPU are not what NCCL allows
os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")

import matplotlib.figure  # noqa: E402, F401

import gpt4moe.drill.planted  # noqa: E402
import gpt4moe.pages.run_report  # noqa: E402
import gpt4moe.train  # noqa: E402, F401

# A collection in a forked rank then passes over what was imported here: a quarter of the time of a short run.
gc.collect()
gc.freeze()
