"""Faults, planted inside the ranks by patching the product there. Nothing in the product knows of them."""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any
from unittest.mock import patch

import torch

from gpt4moe.model import gpt
from gpt4moe.model.parameters import shards
from gpt4moe.moe import layer
from gpt4moe.moe.routers.sigmoid_bias import SigmoidBias
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.proof.outcome import RankAnswer
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.ranks import run_phases
from gpt4moe.training import step
from gpt4moe.training.engine import OwnedRange
from gpt4moe.training.engine_deepspeed import DeepSpeedEngine
from gpt4moe.training.engine_megatron import MegatronEngine
from tests.proof.layout_faults import LAYOUT_FAULTS
from tests.proof.plant import Fault, after


def faulty_phases(environment: Environment, phases: list[Phase], name: str) -> list[RankAnswer]:
    """ranks.run_phases with the fault in place."""
    fault = (FAULTS | LAYOUT_FAULTS | BF16_FAULTS)[name]
    with fault.plant():
        return run_phases(environment, phases, fault.prepare)


def tool_phases(environment: Environment, phases: list[Phase], say: Callable[[str], Any]) -> list[RankAnswer]:
    """prove.rank_phases, with a router's bias that moves the wrong way on several ranks and not on one."""
    several = environment.world_size > 1
    with patch.object(SigmoidBias, "finish_step", _wrong_way) if several else nullcontext():
        return run_phases(environment, phases, None, say)


@torch.no_grad()
def _wrong_way(router: SigmoidBias, load_E: torch.Tensor) -> None:
    router.bias.sub_(torch.sign(load_E.mean() - load_E).float(), alpha=router.bias_update_rate)


def _mark_of(suffix: str, mark: str, value: bool) -> Callable[..., None]:
    def change(_: None, chunks: list[Any], *rest: Any) -> None:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith(suffix):
                    setattr(parameter, mark, value)

    return change


def _experts_times_ep(_: None, engine: Any) -> None:
    for owned in engine.owned():
        if not getattr(owned.parameter, "allreduce", True):
            owned.gradient.mul_(engine.groups.layout.ep)


def _experts_a_little_large(_: None, engine: Any) -> None:
    for owned in engine.owned():
        if owned.parameter.dtype is torch.bfloat16 and not getattr(owned.parameter, "allreduce", True):
            owned.gradient.mul_(1.3)


def _long_norm(module: Any) -> AbstractContextManager[Any]:
    """Clips by 1.3 times the norm, in bf16."""
    original = module.gradient_norm

    def wrong(owned: Iterable[OwnedRange], *rest: Any) -> float:
        ranges = list(owned)
        norm: float = original(ranges, *rest)
        return norm * (1.3 if ranges[0].parameter.dtype is torch.bfloat16 else 1.0)

    return patch.object(module, "gradient_norm", wrong)


def _second_update_skipped(engine: Any) -> AbstractContextManager[Any]:
    """In bf16; weights stay equal on all ranks, and the losses hardly show it."""
    original, calls = engine.update, count(1)

    def sometimes(self: Any, learning_rate: float) -> None:
        is_rounded = next(iter(self.owned())).parameter.dtype is torch.bfloat16
        if not (is_rounded and next(calls) == 2):
            original(self, learning_rate)

    return patch.object(engine, "update", sometimes)


def _forget_experts(_: None, engine: Any, chunks: list[Any], *rest: Any) -> None:
    owned = {id(item.parameter): item.parameter for item in engine.owned()}
    engine.counted = {key for key in engine.counted if getattr(owned.get(key), "allreduce", True)}


def _batched_messages(config: Any, *rest: Any) -> None:
    config.batch_p2p_comm, config.overlap_p2p_comm = True, False


def _one_micro_batch_less(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    schedule = _schedule(*args, **kwargs)
    return lambda **call: schedule(**call | {"num_microbatches": call["num_microbatches"] - 1})


_schedule = step.get_forward_backward_func


def _padding_counted() -> AbstractContextManager[Any]:
    original = layer.auxiliary_losses
    return patch.object(layer, "auxiliary_losses", lambda routing, real_T, **more: original(routing, None, **more))


@torch.no_grad()
def _nudge_second_router(chunks: list[Any], groups: ProcessGroups) -> None:
    for parameter, shard, _ in shards(chunks, groups):
        if shard.name.endswith("layers.1.mlp.router.weight") and groups.coordinate["tp"] == 1:
            parameter += 1e-3


EP2, TP2, VPP2 = ("parallel.ep=2",), ("parallel.tp=2",), ("parallel.pp=2", "parallel.vpp=2")
FOUR = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")
DEEPSPEED = ("engine=deepspeed",)
FAULTS = {
    "a wrong reduce group": Fault(
        EP2, "wrong reduce group", lambda: after(gpt, "mark", _mark_of("experts.down", "allreduce", True))
    ),
    "a norm weight without its tp sum": Fault(
        TP2, "missing sum over tp: of all gradients only decoder.layers.2.pre_mlp_layernorm.weight differ",
        lambda: after(gpt, "mark", _mark_of("layers.2.pre_mlp_layernorm.weight", "sequence_parallel", False)),
    ),
    "expert gradients times ep": Fault(
        EP2, "gradients of experts are 2 times what they should be, and 2 is dp = ep",
        lambda: after(MegatronEngine, "reduce", _experts_times_ep),
    ),
    "a clip norm without the experts": Fault(
        EP2, "the norm without experts", lambda: after(MegatronEngine, "__init__", _forget_experts)
    ),
    "crossed pipeline messages": Fault(
        VPP2, "crossed pipeline messages", lambda: after(gpt, "transformer_config", _batched_messages)
    ),
    "an unsynced router": Fault(
        TP2, "unsynchronised copies: decoder.layers.1.mlp.router.weight differs over tp", prepare=_nudge_second_router
    ),
    "a lost micro-batch": Fault(
        EP2, "2 of 3 micro-batches a rank",
        lambda: patch.object(step, "get_forward_backward_func", _one_micro_batch_less),
    ),
    "padding that auxiliary losses count": Fault(EP2, "padding: everything of step 1", _padding_counted),
    "expert gradients times ep under DeepSpeed": Fault(
        (*EP2, *DEEPSPEED), "gradients of experts are 2 times what they should be, and 2 is dp = ep",
        lambda: after(DeepSpeedEngine, "reduce", _experts_times_ep),
    ),
    "a clip norm without the experts under DeepSpeed": Fault(
        (*EP2, *DEEPSPEED), "the norm without experts", lambda: after(DeepSpeedEngine, "__init__", _forget_experts)
    ),
    "a norm weight without its tp sum, four ranks": Fault(
        FOUR, "missing sum over tp: of all gradients only decoder.layers.1.pre_mlp_layernorm.weight, "
        "decoder.layers.3.pre_mlp_layernorm.weight differ",  # the second of each stage
        lambda: after(gpt, "mark", _mark_of("layers.1.pre_mlp_layernorm.weight", "sequence_parallel", False)), ranks=4,
    ),
    "a clip norm without the experts, four ranks under DeepSpeed": Fault(
        (*FOUR, *DEEPSPEED), "the norm without experts",
        lambda: after(DeepSpeedEngine, "__init__", _forget_experts), ranks=4,
    ),
}  # fmt: skip


def _in_bf16(engine: Any, more: tuple[str, ...]) -> dict[str, Fault]:
    layout, module = (*EP2, "precision=bf16", *more), sys.modules[engine.__module__]
    return {
        f"{name}, {engine.__name__}": Fault(layout, suspect, plant)
        for name, suspect, plant in (
            ("a norm of 1.3 times", "wrong clip norm", lambda: _long_norm(module)),
            ("a skipped update", "are as if step 2 had not been taken", lambda: _second_update_skipped(engine)),
            ("expert gradients times 1.3", "gradients of experts down are 1.2",
             lambda: after(engine, "reduce", _experts_a_little_large)),
        )
    }  # fmt: skip


BF16_FAULTS = _in_bf16(MegatronEngine, ()) | _in_bf16(DeepSpeedEngine, DEEPSPEED)
"""That fp32 does not have."""
