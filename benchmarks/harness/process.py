"""One process with its groups, and a line that says what machine this is."""

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout


@contextmanager
def one_process(threads: int | None = None) -> Iterator[ProcessGroups]:
    """The groups of a world of one; `threads` for torch's CPU kernels."""
    warnings.filterwarnings("ignore")
    if threads is not None:
        torch.set_num_threads(threads)
    with world(Environment(rank=0, world_size=1, local_rank=0, master=None, source="benchmark")) as device:
        yield ProcessGroups.create(Layout.from_config(ParallelConfig(), 1), 0, device, seed=1)


def machine() -> str:
    """Cores, the widest vector instructions, torch, and how busy it was before: a load of 0 means alone."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    vectors = next(
        (name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), platform.machine()
    )
    return (
        f"{len(os.sched_getaffinity(0))} cores, {vectors}, threads {torch.get_num_threads()}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
