"""What tools/rehearse_gpu.py does: reads its arguments, rehearses one rank, prints text or JSON.

arguments --read--> GpuRequest --load--> run --guard, then torch--> two steps --> report, exit status
"""

import json
import logging
import re
import sys
import time
import warnings
from dataclasses import dataclass

from rich.console import Console

from gpt4moe.config.cluster import Generation
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.gpu_rehearsal import guard
from gpt4moe.parallel.kernel_problems import DeviceKind, kernel_problems
from gpt4moe.parallel.layout import Layout, fewest_ranks
from gpt4moe.parallel.legality import refuse, require_legal
from gpt4moe.runlog.command_line import split_arguments

_OWN = ("ranks", "rank", "output")
DEFAULT_CLUSTER = "cluster=h200_141g"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRequest:
    """The arguments of the tool."""

    overrides: list[str]
    ranks: int | None
    """The world; None: the cluster's devices, or the fewest that hold the layout."""
    rank: int
    as_json: bool


def read(arguments: list[str]) -> GpuRequest:
    """Raises: ConfigError for a value that an argument cannot have."""
    own, overrides, as_json = split_arguments(arguments, _OWN, "gpu-rehearsal")
    if not re.fullmatch(r"[1-9]\d{0,6}", own.get("ranks", "1")):
        raise ConfigError(f"ranks={own['ranks']} is no number of ranks.", "Write ranks=64, or leave it out.")
    if not re.fullmatch(r"\d{1,7}", own.get("rank", "0")):
        raise ConfigError(f"rank={own['rank']} is no rank.", "Write rank=0, or leave it out.")
    return GpuRequest(
        overrides=overrides,
        ranks=int(own["ranks"]) if "ranks" in own else None,
        rank=int(own.get("rank", "0")),
        as_json=as_json,
    )


def checked(request: GpuRequest) -> tuple[RunConfig, Layout]:
    """The run on a GPU (an H200 where the overrides name none), and its layout.

    Raises: ConfigError, LayoutError for a run that the trainer would refuse, or a rank that the world does not have.
    """
    run = load_run_config(request.overrides)
    if run.cluster.generation is Generation.cpu:
        run = load_run_config([*request.overrides, DEFAULT_CLUSTER])
    if run.cluster.generation.is_amd:
        raise ConfigError(
            f"cluster={run.cluster.name} has AMD's GPUs, and the rehearsal knows the kernels of CUDA builds of torch.",
            "Choose a cluster of NVIDIA's: cluster=h200_141g.",
        )
    world_size = request.ranks or run.cluster.devices or fewest_ranks(run.parallel)
    require_legal(run.model, run.parallel, run.training, world_size)
    refuse(kernel_problems(run, DeviceKind.of_cluster(run.cluster)))
    if request.rank >= world_size:
        raise ConfigError(
            f"rank={request.rank} is not in a world of {world_size} ranks.", f"Write rank=0 to rank={world_size - 1}."
        )
    return run, Layout.from_config(run.parallel, world_size)


def run(request: GpuRequest) -> int:
    """Rehearses and prints; 0 when nothing was refused, else 1. Raises: Gpt4MoeError for bad input."""
    asked, layout = checked(request)
    guard.load()
    started = time.monotonic()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    # torch may be imported only now.
    from gpt4moe.gpu_rehearsal import report
    from gpt4moe.gpu_rehearsal.steps import rehearse

    done = rehearse(asked, layout, request.rank)
    if request.as_json:
        sys.stdout.write(json.dumps(report.as_data(done), indent=1, allow_nan=False) + "\n")
    else:
        wide = None if sys.stdout.isatty() else 200
        report.show(done, time.monotonic() - started, Console(highlight=False, soft_wrap=True, width=wide))
    return 1 if done.notes.problems else 0
