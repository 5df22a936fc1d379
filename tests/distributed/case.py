"""One tiny run on a layout, in ranks of tests/spawn.py; what it did comes back as logical tensors."""

from typing import Any

import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.proof.outcome import Outcome, assemble
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.ranks import run_phases
from tests.spawn import run_ranks

__all__ = ["BASE", "Outcome", "outcome", "synthetic_batches"]

# Six micro-batches of two: at least three a rank under dp 2, and whole rounds of an interleaved pp 2.
BASE = (
    "+experiment=tiny", "run.name=test", "data=mock", "model.num_layers=4", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=16", "model.vocab_size=64",
    "model.moe.num_experts=4", "model.moe.ffn_hidden_size=24", "training.global_batch_size=12",
    "training.micro_batch_size=2", "model.moe.router.load_balancing_coefficient=0.1",
    "model.moe.router.z_loss_coefficient=0.01", "model.init_std=0.2", "optimizer.clip_norm=0.5", "optimizer.lr=0.003",
    "schedule=constant", "schedule.total_steps=100", "schedule.warmup_steps=0",
)  # fmt: skip


def outcome(
    world_size: int, overrides: tuple[str, ...] = (), *, steps: int = 1, sgd: float | None = None, starve: bool = False,
    base: tuple[str, ...] = BASE,
) -> Outcome:  # fmt: skip
    """Runs the case on `world_size` ranks and puts the pieces together.

    Args:
        sgd: a learning rate: weights then move by plain descent along the reduced and clipped main gradients, which
            shows a wrong gradient scale that AdamW hides.
        starve: half of the experts get no token (needs 8 experts).
        base: what the run is before `overrides`.
    """
    phase = Phase(run=load_run_config([*base, *overrides]), steps=steps, descent=sgd)
    return outcomes(world_size, {"": phase}, starve=starve)[""]


def outcomes(world_size: int, phases: dict[str, Phase], *, starve: bool = False) -> dict[str, Outcome]:
    """Several runs on one layout, whose ranks start once."""
    answers = run_ranks(world_size, run_phases, list(phases.values()), starve_half if starve else None)
    found = {name: assemble([answer[at] for answer in answers]) for at, name in enumerate(phases)}
    for whole in found.values():
        # Every rank reports the same numbers, every element has one owner, and copies are equal to the bit.
        assert whole.problems == []
    return found


def descents(world_size: int, cases: dict[str, tuple[str, ...]], *, steps: int, rate: float) -> dict[str, Outcome]:
    """Each case's run by plain descent; all have one layout, whose ranks start once."""
    phases = {
        name: Phase(run=load_run_config([*BASE, *overrides]), steps=steps, descent=rate)
        for name, overrides in cases.items()
    }
    return outcomes(world_size, phases)


@torch.no_grad()
def starve_half(chunks: list[Any], groups: ProcessGroups) -> None:
    """With top-2 of eight experts: 0 and 1 answer to opposite signs of one direction, 2 and 3 of another, so one of
    each pair always beats the zero logits of 4 to 7, which get no token (under ep=2, a whole rank has no rows)."""
    for parameter, shard, _ in shards(chunks, groups):
        if shard.name.endswith("router.weight"):
            parameter[1], parameter[3] = -parameter[0], -parameter[2]
            parameter[4:] = 0.0
