"""Faults that other stacks shipped, each planted on the smallest mesh that shows it: all are caught, and named."""

from functools import cache

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof import plan
from gpt4moe.proof.prove import Outcomes, Proof, judge
from gpt4moe.proof.shrink import Shrunk
from tests.distributed.case import BASE
from tests.proof.faults import BF16_FAULTS, DEEPSPEED, EP2, FAULTS, TP2, VPP2
from tests.proof.layout_faults import LAYOUT_FAULTS
from tests.proof.outcomes import outcomes
from tests.proof.plant import Fault

pytestmark = pytest.mark.layouts


# Steps as short as a proof's: longer ones carry round-off further than its tolerances allow.
RUN = (*BASE, "optimizer.clip_norm=0.1")


@cache
def one_process(*model: str) -> Outcomes:
    """Without a fault. Faults of one model share it."""
    return outcomes(1, plan.phases(load_run_config([*RUN, *model]), 1))


@cache
def on_ranks(layout: tuple[str, ...], ranks: int, fault: str | None) -> Outcomes:
    return outcomes(ranks, plan.phases(load_run_config([*RUN, *layout]), ranks), fault=fault)


def judged(layout: tuple[str, ...], got: Outcomes, want: Outcomes, ranks: int) -> Proof:
    run = load_run_config([*RUN, *layout])
    proved = Layout.from_config(run.parallel, ranks)
    return judge(Shrunk(asked=run, asked_layout=proved, run=run, layout=proved), got, want, 0.0)


@cache
def proof_of(layout: tuple[str, ...], fault: str | None) -> Proof:
    planted = (FAULTS | LAYOUT_FAULTS)[fault] if fault else Fault(layout, "")
    on_layout = (*planted.model, *layout)
    return judged(on_layout, on_ranks(on_layout, planted.ranks, fault), one_process(*planted.model), planted.ranks)


@pytest.mark.parametrize("fault", FAULTS | LAYOUT_FAULTS)
def test_a_planted_fault_is_caught_and_named(fault: str) -> None:
    planted = (FAULTS | LAYOUT_FAULTS)[fault]
    proof = proof_of(planted.layout, fault)
    assert not proof.is_equal and proof.verdict == "different"
    assert any(planted.suspect in line for line in proof.suspects), proof.suspects


@pytest.mark.parametrize("layout", [EP2, TP2, VPP2], ids=["ep2", "tp2", "pp2-vpp2"])
def test_without_a_fault_the_same_meshes_are_equal_and_nobody_is_suspected(layout: tuple[str, ...]) -> None:
    proof = proof_of(layout, None)
    assert proof.is_equal and proof.first is None and proof.suspects == []
    assert proof.clipped_steps == proof.steps, "steps that are not clipped do not see the norm"


def test_a_run_that_does_not_clip_is_equal_and_a_wrong_norm_of_it_is_caught() -> None:
    """Steps along whole gradients would carry round-off beyond what passes."""
    unclipped, fault = "optimizer.clip_norm=0", "a clip norm without the experts"
    layout, want = (*EP2, unclipped), one_process(unclipped)
    right = judged(layout, on_ranks(layout, 2, None), want, 2)
    assert right.is_equal and right.suspects == [] and right.clipped_steps == right.steps
    wrong = judged(layout, on_ranks(layout, 2, fault), want, 2)
    assert not wrong.is_phase_equal(plan.ADAMW), "where it does not clip"
    assert any(FAULTS[fault].suspect in line for line in wrong.suspects), wrong.suspects


@pytest.mark.parametrize("fault", BF16_FAULTS)
def test_a_fault_of_bf16_alone_is_caught_and_named_in_what_it_hides_in(fault: str) -> None:
    """Each is smaller than what rounding makes of a gradient here, and each passes in fp32."""
    layout = BF16_FAULTS[fault].layout
    proof = judged(layout, on_ranks(layout, 2, fault), one_process("precision=bf16"), 2)
    assert proof.is_phase_equal(plan.DESCENT) and proof.is_phase_equal(plan.ADAMW)
    assert not proof.is_phase_equal(plan.ROUNDED)
    assert any(BF16_FAULTS[fault].suspect in line for line in proof.suspects), proof.suspects


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_without_a_fault_bf16_is_equal_and_nobody_is_suspected(engine: str) -> None:
    layout = (*EP2, "precision=bf16", *(DEEPSPEED if engine == "deepspeed" else ()))
    proof = judged(layout, on_ranks(layout, 2, None), one_process("precision=bf16"), 2)
    assert proof.is_equal and proof.suspects == []


def test_adamw_losses_hide_expert_gradients_times_ep_and_descent_shows_them() -> None:
    fault = "expert gradients times ep"
    proof, want = proof_of(EP2, fault), one_process()
    adamw = {item.name: item for item in proof.numbers[plan.ADAMW]}
    assert adamw["loss"].relative < 1e-4, "twenty AdamW steps of two layouts that are equal are allowed as much"
    wrong = {item.name for item in proof.tensors[plan.DESCENT] if item.kind == "gradient" and item.is_different}
    assert wrong == {name for name in want[plan.DESCENT].gradients if ".experts." in name}
    moved = {item.name for item in proof.tensors[plan.DESCENT] if item.kind == "weight" and item.is_different}
    assert wrong <= moved


def test_a_missing_sum_names_the_first_tensor_its_cut_and_its_groups() -> None:
    proof = proof_of(TP2, "a norm weight without its tp sum")
    assert proof.first is not None
    assert proof.first.name == "decoder.layers.2.pre_mlp_layernorm.weight"
    assert "cut: every rank of a stage holds all of it" in proof.where
    assert "gradient summed over dp_cp: [0] [1]" in proof.where
