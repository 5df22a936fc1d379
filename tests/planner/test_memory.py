"""Memory against what is built: states to the byte, activations against what autograd keeps in a real step."""

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.pipeline.schedule import peak_live, schedule
from gpt4moe.planner.activations import head_activations, layer_bytes
from gpt4moe.planner.memory import (
    again_bytes,
    expert_workspace,
    head_workspace,
    live_activations,
    memory_per_stage,
    peak_live_bytes,
)
from gpt4moe.planner.micro_batch import MicroBatch
from gpt4moe.planner.states import optimizer_bytes, stage_buffers
from tests.distributed.case import BASE
from tests.spawn import run_ranks

if TYPE_CHECKING:
    from gpt4moe.parallel.groups import ProcessGroups

# Ranks and overrides on top of BASE. Sizes are chosen so that 64, 128 and the ranks leave padding everywhere.
STATES: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "dp3, bf16": (3, ("precision=bf16",)),
    "dp3, buckets": (3, ("engine.bucket_size=3000",)),
    "buckets, not overlapped": (2, ("engine.bucket_size=3000", "engine.overlap_grad_reduce=false")),
    "tp2-pp2-ep2, bf16": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "precision=bf16")),
    "dp3-tp2-ep3": (6, ("parallel.tp=2", "parallel.ep=3", "model.moe.num_experts=6")),
    "uneven, dense between": (4, (
        "model.num_layers=5", "parallel.pp=2", "parallel.layers_per_stage=[3,2]", "model.ffn_hidden_size=40",
        "model.moe.layer_pattern=[0,1,0,1,1]", "precision=bf16",
    )),
    "tied, pp4-vpp2": (8, (
        "model.num_layers=8", "parallel.pp=4", "parallel.vpp=2", "model.tied_embeddings=true", "precision=bf16",
        "engine.bucket_size=2000", "training.global_batch_size=32",
    )),
    "vision, pp2-vpp2-tp2": (4, (
        "+vision@model.vision=tiny", "model.vision.cross_attention_every=3", "parallel.tp=2", "parallel.pp=2",
        "parallel.vpp=2", "engine.bucket_size=3000",
    )),
    "etp2-ep2, query and key norms": (8, (
        "parallel.tp=2", "parallel.etp=2", "parallel.ep=2", "model.head_dim=6", "model.qk_norm=true",
    )),
    "adapters, tp2-pp2-ep2, bf16": (4, (
        "parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "stage.lora.rank=4", "precision=bf16",
    )),
    "adapters of one stage, pp2": (2, (
        "parallel.pp=2", "stage.lora.rank=3", "stage.lora.targets=['*.3.*linear_qkv*']",
    )),
    "experts alone, ep2, bf16": (2, ("parallel.ep=2", "stage.train=['*experts*']", "precision=bf16")),
}  # fmt: skip


def _held(environment: Environment) -> dict[str, list[tuple[int, int, int]]]:
    """(weights, gradients, optimizer) bytes of every rank of every case, off the objects that training builds."""
    from gpt4moe.model.gpt import build_model
    from gpt4moe.parallel.meta_device import pretended_rank
    from gpt4moe.rehearsal.rank import held_bytes
    from gpt4moe.training.engine_megatron import MegatronEngine

    answers: dict[str, list[tuple[int, int, int]]] = {}
    for name, (world_size, overrides) in STATES.items():
        run = load_run_config([*BASE, *overrides])
        for rank in range(world_size):
            with pretended_rank(Layout.from_config(run.parallel, world_size), rank) as groups:
                held = held_bytes(MegatronEngine(build_model(run, groups, meta=True), run, groups))
            answers.setdefault(name, []).append((held.weights, held.gradients, held.optimizer))
    return answers


@pytest.fixture(scope="module")
def held() -> dict[str, list[tuple[int, int, int]]]:
    (answers,) = run_ranks(1, _held)
    return answers


@pytest.mark.parametrize("name", STATES)
def test_states_are_what_buffers_and_optimizer_hold_to_the_byte(
    name: str, held: dict[str, list[tuple[int, int, int]]]
) -> None:
    world_size, overrides = STATES[name]
    run = load_run_config([*BASE, *overrides])
    layout = Layout.from_config(run.parallel, world_size)
    planned = memory_per_stage(run, layout)
    for stage in range(layout.pp):
        ranks = held[name][stage * layout.stage_size : (stage + 1) * layout.stage_size]
        memory, of_ranks = planned[stage], optimizer_bytes(run, layout, stage_buffers(run, layout, stage))
        assert ranks == [(memory.weights_bytes, memory.gradients_bytes, optimizer) for optimizer in of_ranks]
        fullest = max(range(layout.stage_size), key=lambda inside, ranks=ranks: sum(ranks[inside]))  # type: ignore[misc]
        assert memory.rank == stage * layout.stage_size + fullest
        assert memory.states_bytes == sum(ranks[fullest])


# Ranks and overrides on top of BASE, wide enough that index tensors do not rule.
ACTIVATIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dense between, bf16": (1, ("model.moe.layer_pattern=[0,1,0,1]", "model.ffn_hidden_size=96", "precision=bf16")),
    "grouped products, query and key norms": (1, (
        "precision=bf16", "kernels.experts=grouped_mm", "model.qk_norm=true", "model.head_dim=32",
    )),
    "tp2-pp2-ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "pp2-vpp2, bf16": (2, ("parallel.pp=2", "parallel.vpp=2", "precision=bf16")),
    "uneven, recompute moe": (2, ("parallel.pp=2", "parallel.layers_per_stage=[3,1]", "parallel.recompute=moe")),
    "recompute full, tp2-ep2": (2, ("parallel.tp=2", "parallel.ep=2", "parallel.recompute=full", "precision=bf16")),
    "cp2-ep2": (2, ("parallel.cp=2", "parallel.ep=2")),
    "recompute selective, cp2": (2, ("parallel.cp=2", "parallel.recompute=selective", "precision=bf16")),
    "etp2": (2, ("parallel.tp=2", "parallel.etp=2")),
    "shared experts": (1, ("model.moe.shared_expert_ffn_hidden_size=96", "precision=bf16")),
    "shared experts, tp2, dense first layer, recompute moe": (2, (
        "model.moe.shared_expert_ffn_hidden_size=96", "parallel.tp=2", "parallel.ep=2", "parallel.recompute=moe",
        "model.moe.layer_pattern=[0,1,1,1]", "model.ffn_hidden_size=96",
    )),
    "sigmoid router with a bias": (1, ("router@model.moe.router=sigmoid_bias",)),
    "group-limited router, loss by sequence": (1, (
        "router@model.moe.router=group_limited", "model.moe.num_experts=8", "model.moe.router.num_groups=4",
        "model.moe.router.load_balancing_coefficient=0.1", "precision=bf16",
    )),
    "switch with capacity and noise": (1, ("router@model.moe.router=switch", "model.moe.top_k=1")),
    "cp2-etp2, recompute selective": (2, (
        "parallel.cp=2", "parallel.etp=2", "parallel.recompute=selective", "precision=bf16",
    )),
    "adapters, dense between, shared experts, bf16": (1, (
        "model.moe.layer_pattern=[0,1,0,1]", "model.ffn_hidden_size=96", "precision=bf16", "stage.lora.rank=8",
        "model.moe.shared_expert_ffn_hidden_size=96",
    )),
    "adapters of attention, grouped products": (1, (
        "stage.lora.rank=8", "stage.lora.targets=['*self_attention*']", "precision=bf16", "kernels.experts=grouped_mm",
    )),
    "adapters, grouped products, recompute moe": (1, (
        "stage.lora.rank=8", "precision=bf16", "kernels.experts=grouped_mm", "parallel.recompute=moe",
    )),
    "adapters, tp2-pp2-ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "stage.lora.rank=8")),
}  # fmt: skip
WIDE = (
    *BASE, "model.hidden_size=64", "model.num_attention_heads=4", "model.seq_length=32", "model.vocab_size=128",
    "model.moe.ffn_hidden_size=64", "model.moe.router.load_balancing_coefficient=0.5", "model.init_std=0.02",
)  # fmt: skip


class _Live:
    """Saved tensors of a step, each storage once while anybody keeps it, and the most there was at once."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor):  # type: ignore[no-untyped-def]
        return _Kept(self, tensor)

    def add(self, storage: int, size: int, sign: int) -> None:
        self.count[storage] = self.count.get(storage, 0) + sign
        if self.count[storage] == (1 if sign > 0 else 0):
            self.now += sign * size
            self.peak = max(self.peak, self.now)


class _Kept:
    def __init__(self, live: _Live, tensor):  # type: ignore[no-untyped-def]
        storage = tensor.untyped_storage()
        self.live, self.tensor, self.key = live, tensor, (storage._cdata, storage.nbytes())
        live.add(*self.key, 1)

    def __del__(self) -> None:
        self.live.add(*self.key, -1)


def _kept_in_steps(environment: Environment, names: list[str]) -> dict[str, tuple[int, float]]:
    """Of each case in turn, see kept_bytes."""
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.proof.batches import synthetic_batches

    answers = {}
    with world(environment) as device:
        for name in names:
            run = load_run_config([*WIDE, *ACTIVATIONS[name][1]])
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            batches = synthetic_batches(run, 1, layout.dp, groups.coordinate["dp"])
            answers[name] = kept_bytes(run, groups, batches)
    return answers


def kept_bytes(run: RunConfig, groups: "ProcessGroups", batches: list[Any]) -> tuple[int, float]:
    """(the most that autograd keeps at once in a real step, without parameters; rows at this rank's experts over an
    even share, in the fullest micro-batch: what is live at once, one layer where full recompute brings back one)."""
    import torch

    from gpt4moe.model.gpt import build_model
    from gpt4moe.moe.experts import Experts
    from gpt4moe.training.engine_megatron import MegatronEngine
    from gpt4moe.training.step import StepRunner

    layout = groups.layout
    engine = MegatronEngine(build_model(run, groups), run, groups)
    live, rows, layers = _Live(), [], 0
    for chunk in engine.chunks:
        for parameter in chunk.parameters():  # never counted
            live.count[parameter.untyped_storage()._cdata] = 1
        experts = [module for module in chunk.modules() if isinstance(module, Experts)]
        layers = max(layers, len(experts))  # the resampler, a chunk of its own, has none
        for module in experts:
            module.register_forward_pre_hook(lambda _, inputs: rows.append(int(inputs[2].counts.sum())))
    runner = StepRunner(run, engine, groups)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept.tensor):
        runner.forward_backward(batches)
    at_once = 1 if run.parallel.recompute is Recompute.full else layers
    fullest = max(sum(rows[i : i + at_once]) / at_once for i in range(0, len(rows), at_once))
    even = run.training.micro_batch_size * run.model.seq_length // (layout.tp * layout.cp) * layout.etp
    assert run.model.moe is not None
    return live.peak, fullest / (even * run.model.moe.top_k) if layout.ep > 1 else 1.0


@cache
def kept_of_ranks(world_size: int) -> list[dict[str, tuple[int, float]]]:
    """All cases of one number of ranks, in one start of them; by rank."""
    names = [name for name, (ranks, _) in ACTIVATIONS.items() if ranks == world_size]
    return run_ranks(world_size, _kept_in_steps, names)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_within_5_percent_of_what_autograd_keeps_in_a_step(name: str) -> None:
    world_size, overrides = ACTIVATIONS[name]
    run = load_run_config([*WIDE, *overrides])
    layout = Layout.from_config(run.parallel, world_size)
    for rank, answers in enumerate(kept_of_ranks(world_size)):
        kept, imbalance = answers[name]
        micro, stage = MicroBatch.of(run, layout, imbalance), layout.coordinate(rank)["pp"]
        planned = live_activations(run, layout, micro)[stage]
        if run.parallel.recompute is Recompute.moe:  # torch's checkpoint hides from our hooks what it computes again
            planned -= again_bytes(run, layout, micro, stage)
        assert planned == pytest.approx(kept, rel=0.05), rank


def test_one_kernel_for_swiglu_makes_none_of_the_six_fp32_copies_of_an_activation() -> None:
    def of(*more: str) -> MicroBatch:
        run = load_run_config(["+experiment=gpt4", "run.name=test", *more])
        return MicroBatch.of(run, Layout.from_config(run.parallel, run.cluster.devices or 0), 1.25)

    fused, plain = of(), of("kernels.swiglu=torch")
    assert fused.model.moe is not None and (fused.fused_swiglu, plain.fused_swiglu) == (True, False)
    copies = 6 * 4 * fused.expert_rows * fused.model.moe.ffn_hidden_size
    assert expert_workspace(plain) - expert_workspace(fused) == copies
    assert not of("kernels.experts=per_expert").fused_swiglu and not of("cluster=cpu").fused_swiglu


def test_the_fused_rotary_embedding_and_loss_keep_no_projection_no_sines_and_no_probabilities() -> None:
    def of(*more: str) -> MicroBatch:
        run = load_run_config(["+experiment=mixtral_slice", "run.name=test", *more])
        return MicroBatch.of(run, Layout.from_config(run.parallel, 1), 1.0)

    fused, plain = of(), of("kernels.rotary=torch", "kernels.cross_entropy=torch")
    heads, groups, width, tokens = 32, 8, 128, 4096
    spared = 2 * tokens * (heads + groups) * width + 4 * 2 * tokens * width  # queries and keys before; sines, cosines
    assert layer_bytes(plain, 0) - layer_bytes(fused, 0) == spared
    assert head_activations(plain)["logits"] - head_activations(fused)["logits"] == 2 * tokens * 32000
    normed = [of("model.qk_norm=true", f"kernels.rotary={key}") for key in ("torch", "auto")]
    assert layer_bytes(normed[0], 0) - layer_bytes(normed[1], 0) == 4 * 2 * tokens * width
    assert not of("cluster=cpu").fused_loss and not of("cluster=cpu").fused_rotary
    torchs, ours = (head_workspace(of("precision=fp32", f"kernels.cross_entropy={key}")) for key in ("torch", "auto"))
    assert ours - torchs == 4 * tokens * 32000, "a gradient beside the logits, not in the place of probabilities"


@pytest.mark.parametrize(
    ("experiment", "change"), [("gpt4", "parallel.recompute_layers=5"), ("gpt4_8x220b", "parallel.etp=1")]
)
def test_what_was_reported_of_gpt4_fits_its_devices_and_not_with_less(experiment: str, change: str) -> None:
    def fullest(*more: str) -> float:
        run = load_run_config([f"+experiment={experiment}", "run.name=test", *more])
        stages = memory_per_stage(run, Layout.from_config(run.parallel, run.cluster.devices or 0))
        return max(stage.total_bytes for stage in stages) / run.cluster.memory_bytes

    assert fullest() < 0.96
    assert fullest(change) > 1


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches"), [(1, 1, 4), (4, 1, 2), (15, 1, 35), (4, 2, 4), (4, 3, 40), (2, 5, 12)]
)
def test_live_bytes_are_those_of_the_schedule_slot_by_slot(pp: int, vpp: int, micro_batches: int) -> None:
    run = load_run_config(
        [
            "+experiment=tiny",
            "run.name=live",
            f"training.global_batch_size={micro_batches}",
            "training.micro_batch_size=1",
        ]
    )
    kept = [[1 + (7 * stage + 11 * chunk) % 13 for chunk in range(vpp)] for stage in range(pp)]
    table = schedule(pp=pp, vpp=vpp, micro_batches=micro_batches)
    slots = peak_live(table, [kept[stage][chunk] for chunk in range(vpp) for stage in range(pp)])
    assert peak_live_bytes(run, Layout.from_config(ParallelConfig(pp=pp, vpp=vpp), pp), kept) == slots
