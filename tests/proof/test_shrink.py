"""A run made small keeps what its layout can get wrong: mesh, which layers are what, router, shared experts."""

from itertools import combinations
from types import SimpleNamespace
from typing import cast

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.optimizer import OptimizerKind
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.parallel.kernel_problems import DeviceKind, kernel_problems
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.proof.mesh import lost, reduced, reductions
from gpt4moe.proof.proof_report import unproved
from gpt4moe.proof.shrink import Shrunk, changes, shrink

CPU = DeviceKind(is_gpu=False)


def asked(*overrides: str) -> RunConfig:
    return load_run_config(["run.name=shrink", "data=mock", *overrides])


def legal(meshes: list[Shrunk]) -> Shrunk:
    """The only mesh."""
    (shrunk,) = meshes
    require_legal(shrunk.run.model, shrunk.run.parallel, shrunk.run.training, shrunk.layout.world_size)
    return shrunk


def test_a_mesh_of_eight_ranks_or_fewer_stays_whole_and_uneven_stages_stay_uneven() -> None:
    run = asked("+experiment=tiny", "model.num_layers=5", "parallel.tp=2", "parallel.pp=2", "parallel.ep=4")
    shrunk = legal(shrink(run, ranks=8))
    assert shrunk.layout == shrunk.asked_layout
    assert (shrunk.layout.tp, shrunk.layout.pp, shrunk.layout.dp, shrunk.layout.ep) == (2, 2, 2, 4)
    first, second = stage_layers(shrunk.run.model.num_layers, shrunk.run.parallel)
    assert len(first) > len(second)


def test_gpt4s_mesh_is_reduced_to_divisors_and_the_proof_says_so() -> None:
    meshes = shrink(asked("+experiment=gpt4"), ranks=24960)
    for shrunk in meshes:
        legal([shrunk])
        assert min(shrunk.layout.tp, shrunk.layout.pp, shrunk.layout.dp, shrunk.layout.ep) > 1
        assert_divides(shrunk.layout, shrunk.asked_layout)
        assert shrunk.run.model.hidden_size <= 64 and shrunk.run.model.moe is not None
    assert any(shrunk.layout.expert_dp > 1 for shrunk in meshes), "experts have copies, as asked"
    assert any(mesh.layout.ep > mesh.layout.tp for mesh in meshes), "experts lie beyond tp, as asked"
    stated = "\n".join(unproved(meshes))
    assert "24960 ranks were reduced to 12 (tp 8 -> 2, pp 15 -> 3, dp 208 -> 2, ep 16 -> 4)" in stated
    assert "too few" not in stated


LARGE = {
    "cp too": (("+experiment=gpt4", "parallel.cp=2"), 24960),
    "one of each": (("+experiment=tiny", "parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "parallel.ep=4"), 16),
    "folded": (("+experiment=tiny", "model.num_layers=8", "parallel.tp=2", "parallel.pp=4", "parallel.vpp=2",
                "parallel.ep=2", "parallel.etp=2", "training.global_batch_size=64"), 32),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_every_axis_and_every_two_of_a_large_mesh_are_in_a_reduced_one(name: str) -> None:
    overrides, ranks = LARGE[name]
    meshes = shrink(asked(*overrides), ranks)
    large = meshes[0].asked_layout
    axes = [axis for axis in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp") if getattr(large, axis) > 1]
    for pair in combinations(axes, 2):
        assert any(all(getattr(shrunk.layout, axis) > 1 for axis in pair) for shrunk in meshes), pair
    for shrunk in meshes:
        legal([shrunk])
        assert_divides(shrunk.layout, large)


def test_what_no_mesh_has_is_said_and_is_no_part_of_the_verdict() -> None:
    meshes = shrink(asked("+experiment=tiny", "parallel.tp=2", "parallel.pp=2", "parallel.cp=2"), ranks=16)
    missing = lost(meshes[0].asked_layout, [shrunk.layout for shrunk in meshes])
    assert missing == ["tp, cp, pp, dp all at once: every two of them were together"]
    assert f"{missing[0]}: 12 ranks are too few" in unproved(meshes)


def test_a_degree_without_a_divisor_that_fits_becomes_two_and_that_is_said() -> None:
    large = Layout(tp=2, cp=1, dp=2, pp=13, vpp=1, ep=2, etp=1, sequence_parallel=True)
    (mesh,) = reduced(large)
    assert (mesh.tp, mesh.pp, mesh.dp, mesh.ep) == (2, 2, 2, 2)
    assert reductions(large, mesh) == ["pp 13 -> 2 (no divisor fits)"]


def assert_divides(small: Layout, large: Layout) -> None:
    for axis in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp"):
        assert getattr(large, axis) % getattr(small, axis) == 0, axis


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [("[0,0,1,1,1,1]", [0, 1]), ("[1,0,1,0,1,0]", [1, 0]), ("[1,1,1,1,1,1]", None)],
    ids=["dense first", "alternating", "all MoE"],
)
def test_dense_and_moe_layers_stay_in_their_order(pattern: str, kept: list[int] | None) -> None:
    run = asked("+experiment=tiny", "model.num_layers=6", f"model.moe.layer_pattern={pattern}",
                "model.ffn_hidden_size=96")  # fmt: skip
    shrunk = legal(shrink(run, ranks=1))
    assert shrunk.run.model.moe is not None
    assert shrunk.run.model.moe.layer_pattern == kept


RECOMPUTED = ("parallel.recompute=full", "parallel.recompute_layers=2")
IN_PART = {  # overrides -> layers of each stage, how many of them are recomputed, pattern
    "alike": (("model.num_layers=8",), [2, 2], 1, None),
    "one stage recomputed whole": (("model.num_layers=5",), [2, 1], 1, None),
    "more kept on the first": (("model.num_layers=7",), [3, 2], 1, None),
    "dense and MoE in turn": (("model.num_layers=8", "model.moe.layer_pattern=[0,1,0,1,0,1,0,1]",
                               "model.ffn_hidden_size=96"), [4, 4], 2, [0, 1, 0, 1, 0, 1, 0, 1]),
    "a dense layer first": (("model.num_layers=8", "model.moe.layer_pattern=[0,0,1,1,1,1,1,1]",
                             "model.ffn_hidden_size=96"), [2, 2], 1, [0, 1, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PART)
def test_a_stage_that_is_recomputed_in_part_stays_so(name: str) -> None:
    overrides, sizes, recomputed, pattern = IN_PART[name]
    shrunk = legal(shrink(asked("+experiment=tiny", "parallel.pp=2", *RECOMPUTED, *overrides), ranks=2))
    assert [len(stage) for stage in stage_layers(shrunk.run.model.num_layers, shrunk.run.parallel)] == sizes
    assert shrunk.run.parallel.recompute_layers == recomputed
    assert shrunk.run.model.moe is not None and shrunk.run.model.moe.layer_pattern == pattern
    assert shrunk.oracle.parallel.recompute_layers is None


def test_stages_that_are_recomputed_whole_stay_so() -> None:
    run = asked("+experiment=tiny", "model.num_layers=4", "parallel.pp=2", *RECOMPUTED)
    assert legal(shrink(run, ranks=2)).run.parallel.recompute_layers is None


def test_without_a_word_on_ranks_experts_have_copies_on_the_mesh_itself_where_they_fit() -> None:
    shrunk = legal(shrink(asked("+experiment=tiny", "parallel.ep=2", "parallel.pp=2")))
    assert shrunk.layout.expert_dp == 2 and shrunk.layout == shrunk.asked_layout
    large = shrink(asked("+experiment=gpt4"))
    assert large[0].asked_layout.expert_dp > 1 and any(mesh.layout.expert_dp > 1 for mesh in large)


def test_else_they_have_on_one_more_mesh_and_that_is_said() -> None:
    whole, beside = shrink(asked("+experiment=gpt4", "parallel.tp=2", "parallel.pp=2", "parallel.ep=4"))
    assert whole.layout == whole.asked_layout and whole.layout.world_size == 8 and whole.layout.expert_dp == 1
    legal([beside])
    assert (beside.layout.tp, beside.layout.dp, beside.layout.ep, beside.layout.expert_dp) == (2, 2, 2, 2)
    assert any("copies of experts on that mesh" in line for line in unproved([whole, beside]))


def test_of_asked_ranks_that_leave_every_expert_one_the_missing_copies_are_said() -> None:
    shrunk = shrink(asked("+experiment=tiny", "parallel.ep=4"), ranks=4)
    assert any("copies of experts: no proved mesh has any" in line for line in unproved(shrunk))


def test_gradients_keep_several_buckets_where_the_engine_cuts_them() -> None:
    run = asked("+experiment=tiny", "engine.overlap_grad_reduce=true")
    assert legal(shrink(run, ranks=2)).run.engine.bucket_size == 5000
    for other in ("engine.overlap_grad_reduce=false", "engine=deepspeed"):
        assert legal(shrink(asked("+experiment=tiny", other), ranks=2)).run.engine.bucket_size is None


def test_a_router_keeps_its_rule_and_what_is_small_becomes_large_enough_to_see() -> None:
    run = asked("+experiment=tiny", "model.moe.num_experts=64", "router@model.moe.router=group_limited",
                "model.moe.router.num_groups=8", "model.moe.router.group_topk=4", "model.moe.top_k=4",
                "parallel.ep=2")  # fmt: skip
    before, after = (side.model.moe for side in (run, legal(shrink(run, ranks=2)).run))
    assert before is not None and after is not None
    for name in ("kind", "num_groups", "group_topk", "load_balancing_scope", "scaling_factor", "drop_policy"):
        assert getattr(after.router, name) == getattr(before.router, name), name
    assert after.top_k == before.top_k and after.num_experts < before.num_experts
    assert after.router.bias_update_rate > before.router.bias_update_rate > 0
    assert after.router.z_loss_coefficient == 0, "a loss that is off stays off"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shared_experts_shrink_to_a_width_that_tp_divides(tp: int) -> None:
    run = asked("+experiment=tiny", "model.moe.shared_expert_ffn_hidden_size=4096", f"parallel.tp={tp}",
                "model.num_query_groups=4")  # fmt: skip
    moe = legal(shrink(run, ranks=tp)).run.model.moe
    assert moe is not None and moe.shared_expert_ffn_hidden_size is not None
    assert moe.shared_expert_ffn_hidden_size <= 96 and moe.shared_expert_ffn_hidden_size % tp == 0


def test_what_the_trainer_refuses_is_refused_and_not_shrunk_into_something_legal() -> None:
    with pytest.raises(LayoutError):
        shrink(asked("+experiment=tiny", "parallel.tp=3"))


def test_an_optimizer_that_no_proof_knows_is_refused_before_anything_else() -> None:
    """Not by the one process's engine, whose advice would be the engine that was asked for."""
    run = load_run_config(["+experiment=tiny", "run.name=x", "engine=deepspeed"])
    run.optimizer.kind = cast(OptimizerKind, SimpleNamespace(value="nadam"))
    with pytest.raises(ConfigError, match=r"optimizer\.kind=nadam is not proved") as caught:
        shrink(run)
    assert "optimizer.kind=adamw" in caught.value.cure


def test_kernels_of_gpus_become_those_of_a_cpu_and_are_named_as_not_proved() -> None:
    triton = [f"kernels.{key}=triton" for key in ("swiglu", "rotary", "cross_entropy", "router")]
    run = asked("+experiment=tiny", "precision=bf16", "kernels=nvidia", *triton)
    shrunk = legal(shrink(run, ranks=1))
    assert kernel_problems(run, CPU) and not kernel_problems(shrunk.run, CPU)
    (line,) = [line for line in unproved([shrunk]) if line.startswith("GPU kernels")]
    for chosen in (
        "Transformer Engine's attention", "apex's norm", "grouped product of experts", "Triton's swiglu",
        "Triton's rotary", "Triton's cross_entropy", "Triton's router",
    ):  # fmt: skip
        assert chosen in line


def test_a_run_on_gpus_is_proved_with_gradients_that_add_themselves_against_one_process_without() -> None:
    gpu, deepspeed, plain = "cluster=h200_141g", "engine=deepspeed", "kernels.weight_gradients=torch"
    for overrides, proved in (
        ((gpu,), "fused"), (("cluster=cpu",), "auto"), ((gpu, deepspeed), "auto"), ((gpu, plain), "torch"),
    ):  # fmt: skip
        (shrunk,) = shrink(asked("+experiment=tiny", *overrides), ranks=1)
        assert shrunk.run.kernels.weight_gradients.value == proved
        assert shrunk.oracle.kernels.weight_gradients.value == "torch"
        assert not [key for key, *_ in changes(shrunk) if "weight_gradients" in key]
