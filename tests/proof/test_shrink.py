"""A run made small keeps what its layout can get wrong: mesh, which layers are what, router, shared experts."""

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.proof.shrink import Shrunk, shrink
from gpt4moe.proof.unproved import unproved


def asked(*overrides: str) -> RunConfig:
    return load_run_config(["run.name=shrink", "data=mock", *overrides])


def legal(shrunk: Shrunk) -> Shrunk:
    require_legal(shrunk.run.model, shrunk.run.parallel, shrunk.run.training, shrunk.layout.world_size)
    return shrunk


def test_a_mesh_of_eight_ranks_or_fewer_stays_whole_and_uneven_stages_stay_uneven() -> None:
    run = asked("+experiment=tiny", "model.num_layers=5", "parallel.tp=2", "parallel.pp=2", "parallel.ep=4")
    shrunk = legal(shrink(run, ranks=8))
    assert shrunk.layout == shrunk.asked_layout
    assert (shrunk.layout.tp, shrunk.layout.pp, shrunk.layout.dp, shrunk.layout.ep) == (2, 2, 2, 4)
    first, second = stage_layers(shrunk.run.model.num_layers, shrunk.run.parallel)
    assert len(first) > len(second)


def test_gpt4s_mesh_is_reduced_in_kind_and_the_proof_says_so() -> None:
    shrunk = legal(shrink(asked("+experiment=gpt4"), ranks=24960))
    layout = shrunk.layout
    assert layout.world_size == 8 and min(layout.tp, layout.pp, layout.dp, layout.ep) > 1
    assert layout.expert_dp > 1, "experts have copies, as asked"
    assert shrunk.run.model.hidden_size <= 64 and shrunk.run.model.moe is not None
    stated = "\n".join(unproved(shrunk))
    assert "24960 ranks were reduced to 8" in stated and "experts spread beyond tp x cp: 8 ranks are too few" in stated


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
