"""What a rank of a test's preflight does: it breaks what the test planted on it, then walks the preflight."""

import os
from dataclasses import replace
from typing import Any

import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.launch import preflight as room
from gpt4moe.launch import speed
from gpt4moe.launch.command import as_data
from gpt4moe.launch.facts import RankFacts
from gpt4moe.parallel.environment import Environment

Planted = dict[int, str]
"""Rank -> fault."""


def flown(environment: Environment, overrides: list[str], planted: Planted, come_seconds: float) -> Any:
    """The report's JSON on the first rank, the exit status on the others, None of a rank that does not come."""
    fault = planted.get(environment.rank, "")
    if fault == "stays away":
        return None
    if fault == "no data":
        overrides = [*overrides, "data.path=/nowhere"]
    elif fault.startswith("on "):
        os.environ["SLURMD_NODENAME"] = fault.removeprefix("on ")
    _break(fault)
    run = load_run_config(overrides)
    answer = room.preflight(
        run, environment, world_size=environment.world_size, time_limit_seconds=3600.0, come_seconds=come_seconds
    )
    return answer if isinstance(answer, int) else as_data(*answer)


def _break(fault: str) -> None:
    """In this process alone."""
    if fault == "other torch":
        look = room.rank_facts
        room.rank_facts = lambda local_rank: _with_torch(look(local_rank), "2.8.0")
    elif fault == "sees nothing":
        room.rank_files.sees = lambda path: False
    elif fault == "slow":
        time = speed.matrix_flops
        speed.matrix_flops = lambda device, dtype: 0.05 * time(device, dtype)
    elif fault == "breaks off":
        speed.matrix_flops = _card_lost
    elif fault == "is left":
        room.GROUP_SECONDS = 5.0


def _with_torch(facts: RankFacts, version: str) -> RankFacts:
    return replace(facts, versions=facts.versions | {"torch": version})


def _card_lost(device: torch.device, dtype: torch.dtype) -> float:
    raise RuntimeError("the card fell off the bus")
