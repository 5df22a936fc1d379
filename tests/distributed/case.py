"""One tiny run on a layout, in a rank of tests/spawn.py; what it did comes back as logical tensors."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.shard import Shard, flat_rectangles
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.learning_rate import learning_rate
from gpt4moe.training.step import StepRunner
from tests.spawn import run_ranks

# Twelve micro-batches of two: at least three a rank on every layout, and whole rounds of an interleaved pp 4.
BASE = (
    "+experiment=tiny", "run.name=test", "data=mock", "model.num_layers=4", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=16", "model.vocab_size=64",
    "model.moe.num_experts=4", "model.moe.ffn_hidden_size=24", "training.global_batch_size=24",
    "training.micro_batch_size=2", "model.moe.router.load_balancing_coefficient=0.1",
    "model.moe.router.z_loss_coefficient=0.01", "model.init_std=0.2", "optimizer.clip_norm=0.5", "optimizer.lr=0.003",
    "schedule=constant", "schedule.total_steps=100", "schedule.warmup_steps=0",
)  # fmt: skip


@dataclass
class Outcome:
    """What one run did, whole: logical tensors are assembled from every rank's pieces."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    routing: list[np.ndarray] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    """Of the first step, reduced, before clipping."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    """fp32 masters after the last step."""


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
    answers = run_ranks(world_size, _run, (*base, *overrides), steps, sgd, starve)
    first = answers[0]
    for other in answers[1:]:  # every rank reports the same numbers
        assert other["losses"] == first["losses"] and other["norms"] == first["norms"]
    whole = Outcome(first["losses"], first["norms"], first["routing"])
    for kind, target in (("gradients", whole.gradients), ("weights", whole.weights)):
        covered: dict[str, int] = {}
        for answer in answers:
            for name, global_shape, offset, values in answer[kind]:
                box = target.setdefault(name, np.full(global_shape, np.nan, dtype=np.float32))
                box[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
                covered[name] = covered.get(name, 0) + values.size
        for name, box in target.items():
            assert covered[name] == box.size and not np.isnan(box).any(), f"{name} is not covered exactly once"
    return whole


def synthetic_batches(run: RunConfig, step: int, dp: int, dp_index: int) -> list[Batch]:
    """Micro-batches of one rank, the same set on every layout, with very uneven loss masks."""
    generator = torch.Generator().manual_seed(1000 + step)
    micro, seq = run.training.micro_batch_size, run.model.seq_length
    count = run.training.global_batch_size // micro
    tokens = torch.randint(0, run.model.vocab_size, (count, micro, seq + 1), generator=generator)
    # A share of each sequence from nothing to all of it.
    share = torch.rand(count, micro, 1, generator=generator) ** 2
    mask = (torch.rand(count, micro, seq, generator=generator) < share).float()
    positions = torch.arange(seq).expand(micro, seq)
    return [
        Batch(tokens=tokens[i][:, :-1].contiguous(), labels=tokens[i][:, 1:].contiguous(), loss_mask=mask[i],
              position_ids=positions)
        for i in range(dp_index, count, dp)
    ]  # fmt: skip


def _run(
    environment: Environment, overrides: tuple[str, ...], steps: int, sgd: float | None, starve: bool
) -> dict[str, Any]:
    run = load_run_config(list(overrides))
    require_legal(run.model, run.parallel, run.training, environment.world_size)
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        chunks = build_model(run, groups)
        if starve:
            _starve_half(chunks, groups)
        engine = MegatronEngine(chunks, run, groups)
        runner = StepRunner(run, engine, groups)
        result: dict[str, Any] = {"losses": [], "norms": [], "routing": []}
        for step in range(1, steps + 1):
            batches = synthetic_batches(run, step, layout.dp, groups.coordinate["dp"])
            done = runner.forward_backward(batches)
            engine.reduce()
            if step == 1:
                result["gradients"] = _pieces(engine, groups, "gradient")
            result["losses"].append(done.loss)
            result["routing"].append(done.routing.numpy())
            result["norms"].append(engine.clip())
            if sgd is None:
                engine.update(learning_rate(step, run.optimizer.lr, run.schedule))
            else:
                _descend(engine, sgd, step)
        result["weights"] = _pieces(engine, groups, "master")
    return result


@torch.no_grad()
def _descend(engine: MegatronEngine, rate: float, step: int) -> None:
    for owned in engine.owned():
        owned.master.sub_(owned.gradient, alpha=rate)
    engine.finish_load(step)


def _pieces(engine: MegatronEngine, groups: ProcessGroups, what: str) -> list[tuple[Any, ...]]:
    """(name, global shape, offset, values) of everything this rank owns and writes."""
    boxes: dict[int, Shard] = {id(p): shard for p, shard, _ in shards(engine.chunks, groups)}
    out = []
    for owned in engine.owned():
        shard = boxes[id(owned.parameter)]
        if not shard.is_writer:
            continue
        flat = getattr(owned, what).detach().float().numpy()
        for part in flat_rectangles(owned.start, owned.end, shard.shape):
            size = int(np.prod(part.shape))
            values = flat[part.start - owned.start :][:size].reshape(part.shape).copy()
            offset = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
            out.append((shard.name, shard.global_shape, offset, values))
    return out


@torch.no_grad()
def _starve_half(chunks: list[Any], groups: ProcessGroups) -> None:
    """With top-2 of eight experts: 0 and 1 answer to opposite signs of one direction, 2 and 3 of another, so one of
    each pair always beats the zero logits of 4 to 7, which get no token (under ep=2, a whole rank has no rows)."""
    for parameter, shard, _ in shards(chunks, groups):
        if shard.name.endswith("router.weight"):
            parameter[1], parameter[3] = -parameter[0], -parameter[2]
            parameter[4:] = 0.0
