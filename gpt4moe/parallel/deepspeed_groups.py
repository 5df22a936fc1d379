"""Embassy to DeepSpeed: its communication layer, which its expert-parallel parts call."""

import importlib
import logging
import os

import torch


def start(backend: str) -> None:
    """Puts deepspeed.comm over the torch.distributed world that is already up. Backend: "gloo" or "nccl"."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU DeepSpeed would compile a C++ all-reduce at start (1-2 minutes, a lock between jobs); gloo does the work.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    import deepspeed

    deepspeed.init_distributed(backend, verbose=False)
