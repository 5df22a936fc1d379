"""A refused layout names the wrong numbers, and its cure is one: applied, the same run is legal."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.config.load import load_run_config
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.step_sizes import BatchLevelConfig, LengthLevelConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import grouped_product_problems, layout_problems, require_legal, support_problems
from gpt4moe.parallel.placement import stage_layers

MODEL = ModelConfig(
    name="m", num_layers=4, hidden_size=96, num_attention_heads=12, num_query_groups=4, seq_length=24, vocab_size=96,
    moe=MoEConfig(num_experts=16, ffn_hidden_size=32),
)  # fmt: skip
DENSE = replace(MODEL, moe=None, ffn_hidden_size=90)
TRAINING = TrainingConfig(steps=1, global_batch_size=24, micro_batch_size=1)


def ramp(size: int) -> list[BatchLevelConfig]:
    return [BatchLevelConfig(global_batch_size=size, until_samples=9)]


# what is wrong: (model, parallel, training changes, world, numbers in the cause, cure in words, the cure applied)
def shorter(seq_length: int, global_batch_size: int | None = None) -> list[LengthLevelConfig]:
    return [LengthLevelConfig(seq_length=seq_length, until_step=5, global_batch_size=global_batch_size)]


REFUSALS: dict[str, tuple[ModelConfig, dict[str, Any], dict[str, Any], int, str, str, dict[str, Any]]] = {
    "grid does not divide the world": (
        MODEL, {"tp": 2, "pp": 2}, {}, 6, "tp=2 x pp=2 x cp=1 = 4 6", "[1, 2, 3, 6]", {"pp": 1}),
    "world is no multiple of the grid": (MODEL, {"tp": 2, "pp": 2}, {}, 6, "4 6", "multiple of 4", {"world": 8}),
    "batch over dp": (MODEL, {}, {"global_batch_size": 24}, 5, "24 1 5", "multiple of 5", {"global_batch_size": 25}),
    "micro-batch over dp": (
        MODEL, {}, {"micro_batch_size": 8}, 6, "24 8 6", "one of [1, 2, 4]", {"micro_batch_size": 4}),
    "tp over query groups": (
        MODEL, {"tp": 8}, {}, 8, "tp=8 num_attention_heads=12 num_query_groups=4", "[1, 2, 4]", {"tp": 4}),
    "tp over heads": (
        replace(MODEL, num_attention_heads=6, num_query_groups=2), {"tp": 4}, {}, 4, "tp=4 num_attention_heads=6",
        "[1, 2]", {"tp": 2}),
    "tp over vocabulary": (replace(MODEL, vocab_size=95), {"tp": 2}, {}, 2, "tp=2 vocab_size=95", "[1]",
        {"tp": 1}),
    "tp over sequence": (replace(MODEL, seq_length=22), {"tp": 4}, {}, 4, "tp=4 seq_length=22", "[1, 2]",
        {"tp": 2}),
    "tp over a context-parallel rank's part of the sequence": (
        replace(MODEL, seq_length=20), {"tp": 4, "cp": 2}, {}, 8, "tp=4 (model.seq_length=20 / parallel.cp=2)=10",
        "[1, 2]", {"tp": 2}),
    "tp over dense feed-forward": (DENSE, {"tp": 4}, {}, 4, "tp=4 ffn_hidden_size=90", "[1, 2]", {"tp": 2}),
    "virtual stages without a pipeline": (MODEL, {"vpp": 2}, {}, 1, "vpp=2 pp=1", "vpp=1", {"vpp": 1}),
    "more stages than layers": (MODEL, {"pp": 4, "vpp": 2}, {}, 4, "pp=4 vpp=2 8 num_layers=4", "4 or less",
        {"vpp": 1}),
    "stage list of another sum": (
        MODEL, {"pp": 2, "layers_per_stage": [3, 2]}, {}, 2, "[3, 2] num_layers=4", "[2, 2]",
        {"layers_per_stage": [2, 2]}),
    "stage list of another length": (
        MODEL, {"pp": 2, "layers_per_stage": [4]}, {}, 2, "[4] pp=2", "null", {"layers_per_stage": None}),
    "a stage that the head fills alone": (
        MODEL, {"pp": 4, "head_counts_as_layer": True}, {}, 4, "pp=4 num_layers=4 [2, 1, 1, 0]", "false",
        {"head_counts_as_layer": False}),
    "a ramp below dp": (
        MODEL, {}, {"batch_ramp": ramp(2)}, 4, "batch_ramp[0] =2 dp 4 0.5 multiple of 4", "=4",
        {"batch_ramp": ramp(4)}),
    "a ramp below the stages": (
        MODEL, {"pp": 2}, {"batch_ramp": ramp(2)}, 4, "=2 dp 2 1 micro-batches pp=2 at least 4", "=4",
        {"batch_ramp": ramp(4)}),
    "a ramp in broken rounds of an interleaved pipeline": (
        MODEL, {"pp": 2, "vpp": 2}, {"batch_ramp": ramp(6)}, 4, "=6 3 micro-batches vpp=2 multiple of 4", "=8",
        {"batch_ramp": ramp(8)}),
    "a ramp whose level the layout cannot have": (
        MODEL, {"pp": 4}, {"batch_ramp": ramp(2), "global_batch_size": 4}, 4, "=2 pp=4 at least 4",
        "Leave the level out: 4", {"batch_ramp": []}),
    "a shorter length over tp and cp": (
        replace(MODEL, seq_length=24), {"tp": 2, "cp": 2}, {"length_ramp": shorter(6)}, 4,
        "length_ramp[until_step=5].seq_length=6 4 cp=2 tp=2", "[4, 8, 12]", {"length_ramp": shorter(12)}),
    "a length that the layout cannot have at all": (
        replace(MODEL, seq_length=16), {"tp": 2, "cp": 4}, {"length_ramp": shorter(4)}, 8,
        "seq_length=4 8 cp=4 tp=2", "[8]", {"length_ramp": shorter(8)}),
    "a length with a batch in broken rounds of an interleaved pipeline": (
        replace(MODEL, seq_length=16), {"pp": 2, "vpp": 2}, {"length_ramp": shorter(8, 6)}, 4,
        "length_ramp[until_step=5].global_batch_size=6 3 micro-batches vpp=2 multiple of 4", "=8",
        {"length_ramp": shorter(8, 8)}),
    "interleaved micro-batches": (
        MODEL, {"pp": 2, "vpp": 2}, {"global_batch_size": 25}, 2, "vpp=2 pp=2 25", "multiple of 2",
        {"global_batch_size": 26}),
    "experts over the stage": (MODEL, {"pp": 2, "ep": 4}, {}, 4, "ep=4 etp=1 2", "[1, 2]", {"ep": 2}),
    "expert tensor parallel over the stage": (
        MODEL, {"ep": 2, "etp": 2}, {}, 2, "ep=2 x etp=2 2", "parallel.etp=1", {"etp": 1}),
    "expert count": (
        replace(MODEL, moe=MoEConfig(num_experts=10, ffn_hidden_size=32)), {"ep": 4}, {}, 4, "ep=4 num_experts=10",
        "[1, 2, 5, 10]", {"ep": 2}),
    "width of an expert": (
        replace(MODEL, moe=MoEConfig(num_experts=16, ffn_hidden_size=33)), {"etp": 2}, {}, 2,
        "etp=2 ffn_hidden_size=33", "etp=1", {"etp": 1}),
    "experts of a dense model": (DENSE, {"ep": 2}, {}, 2, "ep=2", "ep=1", {"ep": 1}),
    "recompute of experts that are not there": (
        DENSE, {"recompute": Recompute.moe}, {}, 1, "recompute=moe 0", "recompute=none", {"recompute": Recompute.none}),
    "context parallel over the sequence": (
        replace(MODEL, seq_length=25), {"cp": 2}, {}, 2, "cp=2 seq_length=25", "multiple of 4", {"seq_length": 28}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_the_numbers_and_a_cure_that_cures(name: str) -> None:
    model, degrees, batch, world, numbers, words, cure = REFUSALS[name]
    problems = layout_problems(model, ParallelConfig(**degrees), replace(TRAINING, **batch), world)
    found = [problem for problem in problems if words in problem.cure]
    assert len(found) == 1, problems
    for number in numbers.split(" "):
        assert number in found[0].cause

    changed = {key: cure[key] for key in cure if key in ("seq_length",)}
    degrees = degrees | {key: cure[key] for key in cure if hasattr(ParallelConfig(), key)}
    batch = batch | {key: cure[key] for key in cure if hasattr(TRAINING, key)}
    cured = layout_problems(
        replace(model, **changed), ParallelConfig(**degrees), replace(TRAINING, **batch), cure.get("world", world)
    )
    assert cured == []


def test_what_is_not_built_is_refused_apart_from_arithmetic() -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=False)
    assert layout_problems(MODEL, parallel, TRAINING, 4) == []
    problems = support_problems(MODEL, parallel)
    assert len(problems) == 1
    assert "parallel.sequence_parallel" in problems[0].cure


def test_require_legal_says_a_problem_in_two_lines() -> None:
    with pytest.raises(LayoutError) as caught:
        require_legal(MODEL, ParallelConfig(tp=2, cp=2), TRAINING, 6)
    cause, cure = str(caught.value).splitlines()
    assert "does not divide the 6 ranks" in cause
    assert "multiple of 4" in cure


def test_require_legal_says_all_problems_at_once() -> None:
    degrees = ParallelConfig(ep=3, layers_per_stage=[3, 3], pp=2)
    with pytest.raises(LayoutError) as caught:
        require_legal(MODEL, degrees, TRAINING, 6)
    cause, cure = str(caught.value).splitlines()
    problems = layout_problems(MODEL, degrees, TRAINING, 6)
    assert len(problems) > 1
    assert cause == " ".join(f"({at}) {problem.cause}" for at, problem in enumerate(problems, start=1))
    assert cure == " ".join(f"({at}) {problem.cure}" for at, problem in enumerate(problems, start=1))


@pytest.mark.parametrize(("experiment", "world"), [("gpt4", 24960), ("gpt4_8x220b", 24960), ("tiny", 1)])
def test_an_experiment_is_legal_at_the_size_it_names(experiment: str, world: int) -> None:
    run = load_run_config([f"+experiment={experiment}", "run.name=x", "training.steps=1"])
    assert layout_problems(run.model, run.parallel, run.training, world) == []


@settings(max_examples=300, deadline=None)
@given(st.builds(
    ParallelConfig, tp=st.integers(1, 5), pp=st.integers(1, 5), vpp=st.integers(1, 2), cp=st.integers(1, 2),
    ep=st.integers(1, 6), etp=st.integers(1, 2),
), st.integers(1, 24))  # fmt: skip
def test_no_problem_means_that_everything_divides(parallel: ParallelConfig, world: int) -> None:
    problems = layout_problems(MODEL, parallel, TRAINING, world)
    if problems:
        assert all(
            re.search(r"\d", problem.cause) and problem.cure.startswith(("Set", "Start", "Give"))
            for problem in problems
        )
        return
    layout = Layout.from_config(parallel, world)
    assert layout.world_size == world
    assert layout.expert_dp * layout.ep * layout.etp * layout.pp == world
    assert all(stage_layers(MODEL.num_layers, parallel))
    assert TRAINING.global_batch_size % (TRAINING.micro_batch_size * layout.dp) == 0


@pytest.mark.parametrize(
    ("hidden_size", "ffn", "etp", "wrong"),
    [
        (96, 32, 4, []),
        (100, 32, 1, ["model.hidden_size=100"]),
        (96, 100, 1, ["model.moe.ffn_hidden_size=100"]),
        (96, 32, 8, ["model.moe.ffn_hidden_size=32 / parallel.etp=8"]),
        (100, 100, 1, ["model.hidden_size=100", "model.moe.ffn_hidden_size=100"]),
    ],
)
def test_the_grouped_product_takes_multiples_of_8(hidden_size: int, ffn: int, etp: int, wrong: list[str]) -> None:
    model = replace(MODEL, hidden_size=hidden_size, moe=MoEConfig(num_experts=16, ffn_hidden_size=ffn))
    problems = grouped_product_problems(model, ParallelConfig(etp=etp))
    assert [problem.cause.partition(" is no multiple of 8")[0] for problem in problems] == wrong
    assert all("kernels.experts=per_expert" in problem.cure for problem in problems)
    assert grouped_product_problems(DENSE, ParallelConfig()) == []
