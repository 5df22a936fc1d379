"""The phases of a proof in ranks of tests/spawn.py, with a fault planted or without."""

from gpt4moe.config.run import RunConfig
from gpt4moe.proof import plan
from gpt4moe.proof.outcome import assemble
from gpt4moe.proof.prove import Outcomes, rank_phases
from tests.proof.faults import faulty_phases
from tests.spawn import run_ranks


def outcomes(world_size: int, run: RunConfig, tokens: int = 0, *, fault: str | None = None) -> Outcomes:
    phases = plan.phases(run, tokens)
    given = (rank_phases, list(phases.values())) if fault is None else (faulty_phases, list(phases.values()), fault)
    answers = run_ranks(world_size, *given)
    return {name: assemble([answer[at] for answer in answers]) for at, name in enumerate(phases)}
