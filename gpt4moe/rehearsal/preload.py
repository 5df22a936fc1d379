"""Imported once by the fork server, for all processes of a rehearsal."""

import gc
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

import gpt4moe.rehearsal.rank  # noqa: E402
import gpt4moe.rehearsal.reading  # noqa: E402, F401

torch.set_num_threads(1)

# A collection in a forked rank then passes over what was imported here: a quarter of the time of a short run.
gc.collect()
gc.freeze()
