"""One process with its groups, another process measured, and a line that says what machine this is."""

import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Measured:
    """Time and memory of a process."""

    seconds: float
    peak_bytes: int
    """Largest anonymous memory: files that the kernel keeps at hand do not count."""
    out: str


def measured(*arguments: str) -> Measured:
    """Runs Python with the arguments to its end. Raises: RuntimeError when it fails."""
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen([sys.executable, *arguments], stdout=file)
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        file.seek(0)
        out = file.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}")
    return Measured(seconds, peak, out)


def reset_peak() -> int:
    """Lets peak_bytes begin anew. Returns: what this process has in memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what there is
    return _status_bytes("self", "VmRSS")


def peak_bytes() -> int:
    """The most that this process had in memory since reset_peak, pages of the files that it maps included."""
    return _status_bytes("self", "VmHWM")


def _anonymous_bytes(process: int) -> int:
    try:
        return _status_bytes(str(process), "RssAnon")
    except OSError:
        return 0


def _status_bytes(process: str, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def machine() -> str:
    """One line: cores, widest vector instructions, torch, and load average (0: nothing else ran)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    vectors = next(
        (name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), platform.machine()
    )
    return (
        f"{len(os.sched_getaffinity(0))} cores, {vectors}, threads {torch.get_num_threads()}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
