"""The phases of a proof in ranks of tests/spawn.py, with a fault planted or without, of whole or of padded batches."""

from collections.abc import Callable
from typing import Any

from gpt4moe.proof.outcome import assemble
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.prove import Outcomes, rank_phases
from tests.distributed.padding import padded_phases
from tests.proof.faults import faulty_phases
from tests.spawn import run_ranks


def outcomes(world_size: int, phases: dict[str, Phase], *, fault: str | None = None) -> Outcomes:
    return _outcomes(world_size, phases, *((rank_phases,) if fault is None else (faulty_phases, fault)))


def padded_outcomes(world_size: int, phases: dict[str, Phase]) -> Outcomes:
    return _outcomes(world_size, phases, padded_phases, 0)


def _outcomes(world_size: int, phases: dict[str, Phase], function: Callable[..., Any], *more: Any) -> Outcomes:
    answers = run_ranks(world_size, function, list(phases.values()), *more)
    return {name: assemble([answer[at] for answer in answers]) for at, name in enumerate(phases)}
