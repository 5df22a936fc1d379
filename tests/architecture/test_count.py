"""Parameters: the planner's table against built models, tensor by tensor, and against what was reported of GPT-4."""

from functools import cache
from typing import Any

import pytest

from gpt4moe.architecture.count import chunk_tensors, count_parameters, rank_parameters
from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.architecture.rows import Spread
from gpt4moe.architecture.tensors import model_tensors
from gpt4moe.config.load import CONFIG_FOLDER, load_run_config
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal, support_problems
from tests.spawn import run_ranks

EXPERIMENTS = sorted(path.stem for path in (CONFIG_FOLDER / "experiment").glob("*.yaml"))
BUILDABLE = ("mixtral_8x7b", "mixtral_8x22b", "qwen3_30b_a3b", "qwen3_235b_a22b", "llama3_405b")
"""Published models that the trainer builds, whole, on one rank of the meta device."""
SMALL = (
    "+experiment=tiny", "data=mock", "model.num_layers=4", "model.hidden_size=64", "model.vocab_size=96",
    "model.seq_length=16",
)  # fmt: skip
# Overrides and ranks: every key that changes a tensor, and every degree that cuts one.
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    **{name: ((f"+experiment={name}",), 0) for name in EXPERIMENTS},
    **{name: (("+experiment=tiny", f"model={name}"), 1) for name in BUILDABLE},
    "dense between": ((*SMALL, "model.moe.layer_pattern=[0,1,1,0]", "model.ffn_hidden_size=48"), 1),
    "dense": ((*SMALL, "model=dense_tiny", "parallel.tp=2"), 2),
    "heads": ((*SMALL, "model.num_attention_heads=8", "model.num_query_groups=4", "model.head_dim=6",
               "model.qk_norm=true", "parallel.tp=4"), 4),
    "uneven": ((*SMALL, "model.num_layers=5", "parallel.pp=2", "parallel.layers_per_stage=[3,2]"), 2),
    "vpp, tied": ((*SMALL, "parallel.pp=2", "parallel.vpp=2", "model.tied_embeddings=true"), 2),
    "shared experts": ((*SMALL, "model.moe.shared_expert_ffn_hidden_size=24", "parallel.tp=2"), 2),
    "vision": ((*SMALL, "+vision@model.vision=tiny", "stage=vision", "model.vision.cross_attention_every=3",
                "parallel.tp=2", "parallel.pp=2", "parallel.vpp=2"), 4),
    "tied": ((*SMALL, "model.tied_embeddings=true", "parallel.tp=2", "parallel.ep=4", "model.moe.num_experts=8"), 4),
}  # fmt: skip


def _built_tensors(environment: Environment) -> dict[str, list[Any]]:
    """Of every case: (logical name, global shape, local elements) of each tensor of each chunk, for one rank of each
    stage."""
    return {name: _built_stages(*case) for name, case in CASES.items()}


def _built_stages(overrides: tuple[str, ...], world_size: int) -> list[Any]:
    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.parameters import shards
    from gpt4moe.parallel.meta_device import pretended_rank

    run = load_run_config([*overrides, "run.name=count"])
    world_size = world_size or _least_world(run.parallel)
    answers = []
    for stage in range(run.parallel.pp):
        rank = (stage + 1) * (world_size // run.parallel.pp) - 1
        with pretended_rank(Layout.from_config(run.parallel, world_size), rank) as groups:
            answers.append([
                [(shard.name, shard.global_shape, parameter.numel()) for parameter, shard, _ in shards([chunk], groups)]
                for chunk in build_model(run, groups, meta=True)
            ])  # fmt: skip
    return answers


@cache
def built_cases() -> dict[str, list[Any]]:
    (built,) = run_ranks(1, _built_tensors)
    return built


@pytest.mark.parametrize("name", CASES)
def test_the_planner_knows_every_tensor_of_every_rank_that_the_trainer_builds(name: str) -> None:
    run = load_run_config([*CASES[name][0], "run.name=count"])
    model, parallel = run.model, run.parallel
    counted = {}
    for stage, chunks in enumerate(built_cases()[name]):
        planned = chunk_tensors(model, parallel, stage)
        for chunk, tensors in zip(chunks, planned, strict=True):
            assert [(t.name, t.shape, t.local_size(parallel)) for t in tensors] == chunk
            counted |= {name: shape for name, shape, _ in chunk}
        of_rank = rank_parameters(model, parallel, stage)
        assert of_rank.total == sum(size for chunk in chunks for *_, size in chunk)
        assert of_rank.expert == sum(size for chunk in chunks for name, _, size in chunk if ".mlp.experts." in name)
    assert counted == {tensor.name: tensor.shape for tensor in model_tensors(model)}
    assert count_parameters(model).total == sum(tensor.size for tensor in model_tensors(model))


def _least_world(parallel: ParallelConfig) -> int:
    """The fewest ranks that the layout fits: sizes do not depend on dp."""
    stage = next(n for n in range(parallel.tp * parallel.cp, 10**6, parallel.tp * parallel.cp)
                 if n % (parallel.ep * parallel.etp) == 0)  # fmt: skip
    return stage * parallel.pp


def test_gpt4_as_reported_in_parameters_and_operations() -> None:
    model = load_run_config(["+experiment=gpt4", "run.name=count"]).model
    count, flops = count_parameters(model), flops_per_token(model)
    assert count.total / 1e12 == pytest.approx(1.833, abs=5e-4)
    assert count.per_component["experts"] / 16 / 1e9 == pytest.approx(110.98, abs=0.01)
    assert count.per_component["attention"] / 1e9 == pytest.approx(55.5, abs=0.05)
    assert count.active / 1e9 == pytest.approx(277.5, abs=0.05)
    assert count.active_with_head / 1e9 == pytest.approx(278.5, abs=0.1)
    assert flops.layers * 13e12 == pytest.approx(2.16e25, rel=0.003)
    assert (flops.layers + flops.attention) * 13e12 == pytest.approx(2.25e25, rel=0.003)


def test_experts_are_the_only_tensors_that_expert_parallelism_cuts() -> None:
    model = load_run_config([*SMALL, "run.name=count"]).model
    whole, cut = ParallelConfig(), ParallelConfig(ep=4)
    for tensor in model_tensors(model):
        parts = 4 if tensor.spread is Spread.experts else 1
        assert tensor.local_size(cut) * parts == tensor.local_size(whole)


# Published: total (exact where weights are public), active as each source counts it, and by which of our counts.
# Davinci is the paper's rounded 175.0B; 47 rows of ours pad its vocabulary, 47 * 12,288 parameters or 0.0003%. gpt-oss
# counts the output layer as active and the embedding not.
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 12.9e9, "active_with_embeddings"),
    "mixtral_8x22b": (140_620_634_112, 39.1e9, "active_with_embeddings"),
    "qwen3_30b_a3b": (30_532_122_624, 3.35e9, "active_with_embeddings"),
    "qwen3_235b_a22b": (235_093_634_560, 22.2e9, "active_with_embeddings"),
    "deepseek_v3": (671_026_404_352, 37.55e9, "active_with_embeddings"),
    "gpt_oss_120b": (116_829_156_672, 5.13e9, "active_with_head"),
    "llama3_405b": (405_853_388_800, 405.85e9, "active_with_embeddings"),
    "davinci_175b": (175.0e9, 175.0e9, "active_with_embeddings"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_parameters(name: str) -> None:
    total, active, which = PUBLISHED[name]
    count = count_parameters(load_run_config(["+experiment=tiny", "run.name=count", f"model={name}"]).model)
    assert count.total == pytest.approx(total, rel=3e-3 if isinstance(total, float) else 0)
    assert getattr(count, which) == pytest.approx(active, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "named"),
    [("deepseek_v3", "model.mla"), ("gpt_oss_120b", "model.planned.attention_sinks"),
     ("davinci_175b", "model.planned.learned_positions"), ("mixtral_8x7b", None), ("qwen3_235b_a22b", None)],
)  # fmt: skip
def test_the_trainer_refuses_what_only_the_planner_knows(name: str, named: str | None) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=count", f"model={name}"])
    problems = support_problems(run.model, run.parallel)
    assert [named in problem.cause for problem in problems] == [True] if named else problems == []
    if named:
        with pytest.raises(LayoutError):
            require_legal(run.model, run.parallel, run.training, 1)


def test_wrong_sizes_of_planned_parts_are_refused() -> None:
    for wrong in ("model.mla.kv_lora_rank=0", "model.mla.q_lora_rank=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            load_run_config(["+experiment=tiny", "run.name=count", "model=deepseek_v3", wrong])
    with pytest.raises(ConfigError, match=r"model\.planned\.sliding_window"):
        load_run_config([
            "+experiment=tiny", "run.name=count", "model=gpt_oss_120b", "model.planned.sliding_window=0"
        ])  # fmt: skip
