"""Memory against what is built: states to the byte, activations against what autograd keeps in a real step."""

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.memory import memory_per_stage, optimizer_bytes, stage_buffers
from tests.distributed.case import BASE
from tests.spawn import run_ranks

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
    "etp2-ep2, query and key norms": (8, (
        "parallel.tp=2", "parallel.etp=2", "parallel.ep=2", "model.head_dim=6", "model.qk_norm=true",
    )),
}  # fmt: skip


def _held(environment: Environment) -> dict[str, list[tuple[int, int, int]]]:
    """(weights, gradients, optimizer) bytes of every rank of every case, off the objects that training builds."""
    from gpt4moe.model.gpt import build_model
    from gpt4moe.parallel.meta_device import pretended_rank
    from gpt4moe.proof.held import held_bytes
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
