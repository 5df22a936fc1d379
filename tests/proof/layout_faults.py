"""Faults that only a layout has, found in other stacks or in review: each in the place where it would be made.

One process does not have them: its router pools over itself, its clip norm sees all experts, and so on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import Tensor, distributed

from gpt4moe.data.batch import Batch
from gpt4moe.model.parameters import shards
from gpt4moe.moe import layer
from gpt4moe.moe.dispatch import Dispatcher
from gpt4moe.moe.layer import ExpertParallelMLP, is_second_forward
from gpt4moe.moe.losses import AttachLoss
from gpt4moe.moe.pool import TokenPool, capacity, kept_assignments
from gpt4moe.moe.routers.base import Router
from gpt4moe.moe.statistics import tokens_of_experts
from gpt4moe.parallel.collectives import gather_rows
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training import engine_deepspeed
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from tests.proof.plant import Fault, after

Planted = AbstractContextManager[Any]


def local_counts() -> Planted:
    """Routers' buffers move by the tokens of one rank."""

    def finish_step(self: StepRunner, result: Any) -> None:
        for module in self.moe_layers.values():
            module.router.finish_step(tokens_of_experts(module.statistics.read(self.groups.device)))

    return patch.object(StepRunner, "finish_step", finish_step)


def gradients_of(ending: str, times: float) -> Planted:
    def scale(_: None, engine: Any) -> None:
        names = {id(parameter): shard.name for parameter, shard, _ in shards(engine.chunks, engine.groups)}
        for owned in engine.owned():
            if names[id(owned.parameter)].endswith(ending):
                owned.gradient.mul_(times)

    return after(MegatronEngine, "reduce", scale)


@torch.no_grad()
def cross_chunks(chunks: list[Any], groups: ProcessGroups) -> None:
    first, second = (dict(chunk.decoder.layers.named_parameters()) for chunk in chunks)
    for name, parameter in first.items():
        mine = parameter.clone()
        parameter.copy_(second[name])
        second[name].copy_(mine)


def shared_experts_without_sum() -> Planted:
    """Each tp rank adds its own part of the shared experts' output."""
    build = layer.build_shared_experts

    def built(config: Any, ffn: int, groups: ProcessGroups, linear: Any) -> Any:
        mlp = build(config, ffn, groups, linear)
        down, tp = mlp.linear_fc2, groups.tp
        down.forward = lambda x: ((x @ down.weight.t()).chunk(tp.size())[tp.rank()], None)
        return mlp

    return patch.object(layer, "build_shared_experts", built)


def capacity_of_rank() -> Planted:
    def kept(index: Tensor, chance: Tensor, *, num_experts: int, factor: float, policy: Any, **_: Any) -> Tensor:
        slots = capacity(len(index), num_experts, index.shape[1], factor)
        return kept_assignments(index, chance, slots, policy, num_experts)

    return patch.object(layer, "kept_of_rank", kept)


def row_to_neighbour() -> Planted:
    plan = Dispatcher.plan

    def moved(self: Dispatcher, index: Tensor, keep: Tensor | None, *_: Any) -> Any:
        index = index.clone()
        index[0, 0] = (index[0, 0] + 1) % self.num_experts
        return plan(self, index, keep)

    return patch.object(Dispatcher, "plan", moved)


def replies_in_another_order() -> Planted:
    combine = Dispatcher.combine
    return patch.object(Dispatcher, "combine", lambda self, y, *rest: combine(self, y.roll(1, 0), *rest))


def drops_in_rank_order() -> Planted:
    def gather(self: TokenPool, rows: Tensor, batch: int) -> Tensor:
        return gather_rows(rows, self.group)

    def own(self: TokenPool, rows: Tensor, batch: int) -> Tensor:
        return rows.chunk(self.size)[self.group.rank()]

    return patch.multiple(TokenPool, gather_in_order=gather, own=own)


def rope_in_rank_order() -> Planted:
    def part(embedding: Tensor, dim: int, group: Any) -> Tensor:
        return embedding.chunk(group.size(), dim)[group.rank()]

    return patch.object(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", part)


def other_cp_slice() -> Planted:
    slice_of = Batch.context_slice
    return patch.object(Batch, "context_slice", lambda self, cp, at: slice_of(self, cp, cp - 1 - at))


def loss_by_local_tokens() -> Planted:
    def local(self: StepRunner, batches: list[Batch]) -> tuple[int, bool]:
        return round(sum(batch.loss_mask.sum().item() for batch in batches)), True

    return patch.object(StepRunner, "_global_tokens", local)


def last_mask_ignored() -> Planted:
    """Of three micro-batches a rank; after their tokens were counted."""
    calls = count(1)

    def unmasked(batch: Batch, *_: Any) -> Batch:
        if next(calls) % 3 == 0:
            batch.loss_mask.fill_(1.0)
        return batch

    return patch.object(Batch, "context_slice", unmasked)


def noise_by_place() -> Planted:
    noise = Router._noise
    return patch.object(Router, "_noise", lambda self, ids, width: noise(self, torch.arange(len(ids)), width))


def losses_times(balance: float, z: float) -> Planted:
    original = layer.auxiliary_losses

    def wrong(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        losses = original(*given, **named)
        return losses[0] * balance, losses[1] * z

    return patch.object(layer, "auxiliary_losses", wrong)


class _Attached:
    """AttachLoss, where `when` and by `times` its scale."""

    def __init__(self, when: Callable[[], bool], times: float = 1.0):
        self.when, self.times = when, times

    def apply(self, output: Tensor, loss: Tensor, scale: float) -> Any:
        return AttachLoss.apply(output, loss, scale * self.times) if self.when() else output


def attached(when: Callable[[], bool], times: float = 1.0) -> Planted:
    return patch.object(layer, "AttachLoss", _Attached(when, times))


def router_detached() -> Planted:
    through = ExpertParallelMLP._through_experts
    return patch.object(
        ExpertParallelMLP, "_through_experts", lambda self, x, weight, plan: through(self, x, weight.detach(), plan)
    )


def not_gathered() -> Planted:
    sync = DistributedDataParallel.start_param_sync

    def only_forced(self: Any, *given: Any, force_sync: bool = False, **named: Any) -> None:
        if force_sync:
            sync(self, *given, force_sync=True, **named)

    return patch.object(DistributedDataParallel, "start_param_sync", only_forced)


def experts_stand_still() -> Planted:
    step = MixedPrecisionOptimizer.step_with_ready_grads

    def stepped(inner: Any) -> Any:
        for group in inner.param_groups:
            group["lr"] *= not group.get("is_expert_parallel")
        return step(inner)

    return patch.object(MixedPrecisionOptimizer, "step_with_ready_grads", stepped)


def _decay_everything(groups: list[dict[str, Any]], *_: Any) -> None:
    for group in groups:
        group["weight_decay"] = max(other["weight_decay"] for other in groups)


def not_zeroed() -> Planted:
    zero, calls = MegatronEngine.zero_gradients, count()
    return patch.object(MegatronEngine, "zero_gradients", lambda self: None if next(calls) else zero(self))


BIAS = ("router@model.moe.router=sigmoid_bias", "model.moe.router.bias_update_rate=0.02",
        "model.moe.router.load_balancing_coefficient=0.1", "model.moe.router.z_loss_coefficient=0.01")  # fmt: skip
SHARE = ("model.moe.router.load_balancing_scope=global_batch",)
SLOTS = ("model.moe.router.capacity_factor=0.8",)
ARRIVAL = (*SLOTS, "model.moe.router.drop_policy=position")
NOISE = ("model.moe.router.input_jitter=0.1",)
DP2: tuple[str, ...] = ()
TP2, EP2, CP2, PP2, ETP2 = (
    ("parallel.tp=2",), ("parallel.ep=2",), ("parallel.cp=2",), ("parallel.pp=2",), ("parallel.etp=2",),
)  # fmt: skip
FULL, MOE = ("parallel.recompute=full",), ("parallel.recompute=moe",)

LAYOUT_FAULTS = {
    "router bias by the counts of a tp rank": Fault(TP2, "router state", local_counts, model=BIAS),
    "router bias by the counts of a dp rank": Fault(DP2, "router state", local_counts, model=BIAS),
    "load share by the counts of a rank": Fault(DP2, "router state", local_counts, model=SHARE),
    "a tied embedding summed twice": Fault(
        PP2, "tied embeddings: of all gradients only that of the embedding differs, it is 2 times",
        lambda: gradients_of("word_embeddings.weight", 2.0), model=("model.tied_embeddings=true",)
    ),
    "weights of virtual stages crossed": Fault(
        ("parallel.pp=2", "parallel.vpp=2"), "layers get each other's weights", prepare=cross_chunks
    ),
    "shared experts without their sum over tp": Fault(
        TP2, "shared experts: their output is wrong", shared_experts_without_sum,
        model=("model.moe.shared_expert_ffn_hidden_size=40",),
    ),
    "capacity by the tokens of a rank": Fault(TP2, "capacity: the router's choices", capacity_of_rank, model=SLOTS),
    "a row to the neighbour expert": Fault(EP2, "dispatch: router and slots are right", row_to_neighbour),
    "replies in another order": Fault(EP2, "dispatch: router and slots are right", replies_in_another_order),
    "drops in the order of ranks": Fault(
        CP2, "capacity: the router's choices are right", drops_in_rank_order, model=ARRIVAL
    ),
    "rotary positions in the order of ranks": Fault(
        CP2, "attention: the order of keys and positions over cp", rope_in_rank_order
    ),
    "the batch's slices of another cp rank": Fault(
        CP2, "tokens: a rank gets other tokens than its place", other_cp_slice
    ),
    "loss by the tokens of a rank": Fault(
        DP2, "loss scaling or loss mask: the loss of every token", loss_by_local_tokens
    ),
    "a mask ignored in the last micro-batch": Fault(
        DP2, "loss scaling or loss mask: the loss of every token", last_mask_ignored
    ),
    "router noise by the place on a rank": Fault(
        TP2, "router noise must be drawn by the number of the token", noise_by_place, model=NOISE
    ),
    "balance loss divided by tp": Fault(
        TP2, "the part of the load-balancing loss is 0.5 times what it should be, and 2 is tp",
        lambda: losses_times(0.5, 1.0),
    ),
    "z-loss times etp": Fault(
        ETP2, "the part of the z-loss is 2 times what it should be", lambda: losses_times(1.0, 2.0)
    ),
    "auxiliary losses by the micro-batches of a rank": Fault(
        DP2, "auxiliary losses: in the gradient of decoder.layers.3.mlp.router.weight",
        lambda: attached(lambda: True, 2.0),
    ),
    "auxiliary losses lost in recomputation": Fault(
        FULL, "(recompute=full runs a part of the forward pass a second time)",
        lambda: attached(lambda: not is_second_forward()),
    ),
    "auxiliary losses on the last stage alone": Fault(
        PP2, "auxiliary losses: in the gradient of decoder.layers.1.mlp.router.weight, the last that differs, the part "
        "of the load-balancing loss is missing", lambda: attached(lambda: distributed.get_rank() == 1),
    ),
    "a router's weight detached under etp": Fault(
        ETP2, "the part of the language model's loss is missing", router_detached
    ),
    "a router's weight detached in recomputation": Fault(
        MOE, "the part of the language model's loss is missing (recompute=moe", router_detached
    ),
    "gradients of norms divided by dp": Fault(
        DP2, "norm before mlp are 0.5 times what they should be, and 2 is dp",
        lambda: gradients_of("norm.weight", 0.5),
    ),
    "weights not gathered after the update": Fault(DP2, "weights not gathered after the update", not_gathered),
    "experts that stand still under ep": Fault(
        EP2, "learning rate: experts gate and up moves 0 times", experts_stand_still
    ),
    "decay of norms in one engine": Fault(
        ("engine=deepspeed",), "weight decay: norm before attention decays 1.00 times optimizer.weight_decay",
        lambda: after(engine_deepspeed, "_parameter_groups", _decay_everything),
    ),
    "gradients that are not zeroed": Fault(DP2, "gradients that are not zeroed: step 1 is right", not_zeroed),
}  # fmt: skip
