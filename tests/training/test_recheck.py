"""A step that is computed twice: every flipped bit is found, its rank and tensor are named; without one nothing moves.

100 flips are drawn from a seed. Each is planted by hooks of this test, at a moment that docs/reliability.md lists.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt4moe.config.load import load_run_config
from gpt4moe.data.batch import Batch
from gpt4moe.errors import CorruptionError
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import buffers, decoder_layers, shards
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.recheck import Recheck
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

MICRO = (
    "model.num_layers=2", "model.seq_length=8", "training.global_batch_size=4", "router@model.moe.router=sigmoid_bias",
    "resilience.recompute_every=1",
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "tp2 x pp2 x ep2": (52, 4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "dp2, deepspeed, bf16": (24, 2, ("engine=deepspeed", "parallel.ep=2", "precision=bf16")),
    "one process": (24, 1, ()),
}
"""Name -> flips, ranks, overrides."""
BEFORE, FIRST, SECOND = "before the step", "in pass 1", "in pass 2"
KINDS = {
    "weight": (BEFORE, FIRST, SECOND), "fp32 master": (BEFORE, FIRST, SECOND), "exp_avg": (BEFORE, FIRST, SECOND),
    "exp_avg_sq": (BEFORE, FIRST, SECOND), "buffer": (BEFORE, FIRST, SECOND), "batch": (BEFORE, FIRST, SECOND),
    "local gradient": (FIRST, SECOND), "reduced gradient": (FIRST, SECOND), "hidden states": (FIRST, SECOND),
}  # fmt: skip
"""What is flipped -> when it can be."""
FIELDS = ("tokens", "labels", "loss_mask", "token_ids")


@dataclass(frozen=True)
class Flip:
    """One bit. `draw` chooses tensor, element and bit on its rank."""

    kind: str
    moment: str
    rank: int
    draw: int


def plan(name: str) -> list[Flip]:
    count, ranks, _ = LAYOUTS[name]
    random = Random(f"flips of {name}")
    kinds = [list(KINDS)[at % len(KINDS)] for at in range(count)]
    return [Flip(kind, random.choice(KINDS[kind]), random.randrange(ranks), random.getrandbits(32)) for kind in kinds]


def flip_bit(tensor: Tensor, draw: int, *, is_computed: bool = False) -> Callable[[], None]:
    """Flips a bit of a tensor behind the back of autograd; what is returned flips it back.

    Args:
        is_computed: the bit is one of the upper mantissa: the lowest may be rounded away in what follows, and the
            highest make NaN, of which sorting makes what it likes.
    """
    random, size = Random(draw), tensor.element_size()
    bits = tensor.data.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    place, bit = random.randrange(bits.numel()), random.randrange(8 * size)
    bit = random.choice({2: range(4, 7), 4: range(16, 23)}[size]) if is_computed else bit
    mask = (1 << bit) - (1 << 8 * size if bit == 8 * size - 1 else 0)  # the sign bit alone is the lowest integer

    def flip() -> None:
        bits[place] ^= mask

    flip()
    return flip


class Planter:
    """Plants one flip at its moment on its rank, by hooks around the engine and the model."""

    def __init__(self, runner: StepRunner):
        self.runner, self.engine, self.groups = runner, runner.engine, runner.groups
        self.flip: Flip | None = None
        self.batches: list[Batch] = []
        self.undo: Callable[[], None] | None = None
        self.flipped = ""
        self.number = 0
        config, reduce = self.engine.chunks[0].config, self.engine.reduce
        finalize, forward_backward = config.finalize_model_grads_func, runner.forward_backward

        def finalized(*args: Any, **kwargs: Any) -> None:
            self.plant("local gradient")
            finalize(*args, **kwargs)

        def reduced() -> None:
            reduce()
            self.plant("reduced gradient")

        def passed(batches: list[Batch]) -> Any:
            self.number += 1
            return forward_backward(batches)

        config.finalize_model_grads_func = finalized
        self.engine.reduce = reduced  # type: ignore[method-assign]
        runner.forward_backward = passed  # type: ignore[method-assign]
        first = min(decoder_layers(self.engine.chunks[0]).items())[1]
        first.register_forward_hook(lambda module, args, output: self.plant("state", output[0]))

    def plant(self, here: str, output: Tensor | None = None) -> None:
        flip, moment = self.flip, (BEFORE, FIRST, SECOND, "")[min(self.number, 3)]
        if flip is None or self.undo is not None or flip.rank != self.groups.rank or moment != flip.moment:
            return
        if flip.kind == "hidden states" and output is not None:
            flip_bit(output, flip.draw, is_computed=True)
            self.undo = lambda: None
        elif here == (flip.kind if "gradient" in flip.kind else "state"):
            found = self._tensors(flip.kind)
            self.flipped, tensor = found[flip.draw % len(found)]
            self.undo = flip_bit(tensor, flip.draw)

    def _tensors(self, kind: str) -> list[tuple[str, Tensor]]:
        names = {id(p): shard.name for p, shard, _ in shards(self.engine.chunks, self.groups)}
        parameters = [p for p, _, _ in shards(self.engine.chunks, self.groups)]
        if kind == "weight":
            return [(names[id(p)], p) for p in parameters]
        if kind == "buffer":
            return [(shard.name, buffer) for buffer, shard in buffers(self.engine.chunks, self.groups)]
        if kind == "batch":
            return [(name, getattr(batch, name)) for batch in self.batches for name in FIELDS]
        if kind == "local gradient":
            return [("", p.main_grad if hasattr(p, "main_grad") else p.grad) for p in parameters]
        owned = list(self.engine.owned())
        if kind == "reduced gradient":
            return [(names[id(it.parameter)], it.gradient) for it in owned]
        return [(names[id(it.parameter)], it.master if "master" in kind else it.states[kind]) for it in owned]


def _planted(environment: Environment, name: str) -> list[tuple[str, str]]:
    """Of each flip of the plan: the error, and the tensor that was flipped on this rank."""
    found = []
    with world(environment) as device:
        run = load_run_config([*BASE, *MICRO, *LAYOUTS[name][2]])
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        runner = StepRunner(run, ENGINES[run.engine.kind](build_model(run, groups), run, groups), groups)
        check, planter, step = Recheck(runner), Planter(runner), 1

        def made() -> list[Batch]:
            return synthetic_batches(run, step, layout.dp, groups.coordinate["dp"])

        def take(flip: Flip | None) -> str:
            planter.flip, planter.batches, planter.number, planter.undo, planter.flipped = flip, made(), 0, None, ""
            check.made_again = made
            check.remember(step - 1)
            planter.plant("state")
            try:
                train_step(runner, step, planter.batches, check=check)
            except CorruptionError as error:
                assert error.exit_code == 1
                return error.cause
            finally:
                if planter.undo is not None:
                    planter.undo()
            return ""

        for number, flip in enumerate(plan(name)):
            if number % 8 == 0:  # without a flip nothing is found, and the state moves on
                assert take(None) == ""
                step += 1
            found.append((take(flip), planter.flipped))
        assert take(None) == ""
    return found


@cache
def planted(name: str) -> list[list[tuple[str, str]]]:
    return run_ranks(LAYOUTS[name][1], _planted, name)


def test_the_plan_has_100_flips_of_every_kind_at_every_moment_on_every_rank() -> None:
    flips = [(name, flip) for name in LAYOUTS for flip in plan(name)]
    assert len(flips) == 100
    assert {(it.kind, it.moment) for _, it in flips} == {(kind, one) for kind, some in KINDS.items() for one in some}
    assert {(name, it.rank) for name, it in flips} == {(name, at) for name in LAYOUTS for at in range(LAYOUTS[name][1])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_flipped_bit_is_found_and_its_rank_and_tensor_are_named_on_every_rank(name: str) -> None:
    answers = planted(name)
    missed = []
    for number, flip in enumerate(plan(name)):
        (cause,) = {answer[number][0] for answer in answers}
        flipped = answers[flip.rank][number][1]
        named = re.findall(r"rank (\d+) \(", cause)
        if named != [str(flip.rank)] or flipped not in cause:
            missed.append((flip, flipped, cause))
    assert missed == []
