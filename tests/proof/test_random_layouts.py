"""Layouts that nobody chose: drawn from a seed, each equal to one process.

CI takes a few that two cores compute in half a minute each and that use every axis and both engines.
`make test-layouts` draws many; LAYOUT_SEED and LAYOUT_DRAWS say which and how many:

    LAYOUT_SEED=17 LAYOUT_DRAWS=1 python -m pytest tests/proof/test_random_layouts.py
"""

import os
import random
from dataclasses import fields
from functools import cache
from itertools import chain

import pytest

from gpt4moe.config.load import CONFIG_FOLDER
from gpt4moe.config.moe import RouterKind
from gpt4moe.config.optimizer import EngineConfig, EngineKind
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.proof.prove import prove_shrunk
from gpt4moe.proof.shrink import Shrunk
from tests.proof.draw import draw, proposal
from tests.proof.outcomes import outcomes, padded_outcomes

pytestmark = pytest.mark.layouts

SEED = int(os.environ.get("LAYOUT_SEED", "0"))
DRAWS = os.environ.get("LAYOUT_DRAWS")
CI_SEEDS = (1, 2, 6, 14)
SEEDS = CI_SEEDS if DRAWS is None else range(SEED, SEED + int(DRAWS))


@pytest.mark.timeout(900)  # up to 8 ranks on two cores
@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_layout_equals_one_process(seed: int) -> None:
    drawn = draw(seed)
    shrunk = Shrunk(asked=drawn.run, asked_layout=drawn.layout, run=drawn.run, layout=drawn.layout)
    proof = prove_shrunk(shrunk, padded_outcomes if drawn.is_padded else outcomes)
    again = f"LAYOUT_SEED={seed} LAYOUT_DRAWS=1 python -m pytest tests/proof/test_random_layouts.py"
    report = "\n".join([again, drawn.layout.describe(), str(drawn), str(proof.first), *proof.problems,
                        *proof.set_aside, *map(str, (n for ns in proof.numbers.values() for n in ns if n.is_different)),
                        *proof.where, *proof.suspects])  # fmt: skip
    assert proof.is_equal, report


def test_the_same_seed_draws_the_same_layout() -> None:
    assert str(draw(SEED)) == str(draw(SEED))
    assert len({draw(seed).overrides for seed in range(SEED, SEED + 3)}) == 3


@pytest.mark.parametrize("kind", RouterKind)
def test_every_kind_of_router_is_drawn(kind: RouterKind) -> None:
    """A kind without its file in configs/router would be refused in every proposal, and never be compared."""
    assert (CONFIG_FOLDER / "router" / f"{'top2' if kind is RouterKind.topk else kind.value}.yaml").exists()
    assert kind in _drawn_routers()


@cache
def _drawn_routers() -> set[RouterKind]:
    routers = [draw(seed).run.model.moe for seed in range(40)]
    return {moe.router.kind for moe in routers if moe is not None}


def test_the_layouts_of_ci_use_every_axis_and_both_engines() -> None:
    chosen = [draw(seed) for seed in CI_SEEDS]
    for axis in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp"):
        assert max(getattr(one.layout, axis) for one in chosen) > 1, axis
    assert {one.run.engine.kind for one in chosen} == set(EngineKind)


def test_every_key_of_a_layout_and_of_an_engine_is_drawn() -> None:
    """Else the draws would be silent about it."""
    rng = random.Random(SEED)
    values: dict[str, set[str]] = {}
    for override in chain.from_iterable(proposal(rng, 8) for _ in range(200)):
        key, _, value = override.partition("=")
        values.setdefault(key, set()).add(value)
    drawn = {key for key, seen in values.items() if len(seen) > 1}
    keys = {f"parallel.{field.name}" for field in fields(ParallelConfig)}
    keys |= {f"engine.{field.name}" for field in fields(EngineConfig)} - {"engine.kind"} | {"engine"}
    assert keys - drawn == {"parallel.sequence_parallel"}, "follows from tp"
