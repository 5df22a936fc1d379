"""The vision parts on every layout: gradients, norms and weights of one process; closed gates; images of others."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from gpt4moe.architecture.trained import trained_names
from gpt4moe.config.load import load_run_config
from gpt4moe.proof import bf16
from gpt4moe.proof.compare import NUMBER_FLOOR, distance, total_norm
from gpt4moe.proof.outcome import Outcome, assemble
from tests.distributed.test_gradients import GRADIENT, NORM, WEIGHT
from tests.distributed.vision import ALL_TRAINED, ALONE, VISION, num_changed, vision_phases
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts


def _degrees(**degrees: object) -> tuple[str, ...]:
    return tuple(f"parallel.{name}={size}" for name, size in degrees.items())


DEEPSPEED = ("engine=deepspeed",)
# The resampler and the gated blocks are frozen, as the rest.
ADAPTERS = ("stage.train=[]", "stage.lora.rank=4", "optimizer.by_pattern=[]", "optimizer.clip_norm=0.05")
LAYOUTS = {
    "dp4-ep2": _degrees(ep=2),
    "tp2-dp2": _degrees(tp=2),
    "pp2-dp2-ep2": _degrees(pp=2, ep=2),
    "pp4": _degrees(pp=4),
    "pp2-vpp2-dp2": _degrees(pp=2, vpp=2),
    "cp2-dp2": _degrees(cp=2),
    "tp2-pp2-ep2": _degrees(tp=2, pp=2, ep=2),
    "tp2-pp2-vpp2-ep2": _degrees(tp=2, pp=2, vpp=2, ep=2),
    "tp2-cp2-ep2-etp2": _degrees(tp=2, cp=2, ep=2, etp=2),
    "pp2-vpp2-cp2-etp2": _degrees(pp=2, vpp=2, cp=2, etp=2),
    "uneven pp2": _degrees(pp=2, layers_per_stage="[1,3]"),
    "tp2-pp2-ep2, deepspeed": (*_degrees(tp=2, pp=2, ep=2), *DEEPSPEED),
    "dp4-etp2, deepspeed": (*_degrees(ep=2, etp=2), *DEEPSPEED),
    "pp2-vpp2-dp2, recompute": _degrees(pp=2, vpp=2, recompute="full"),
    "tp2-dp2, without overlap": (*_degrees(tp=2, recompute="moe"), "engine.overlap_grad_reduce=false"),
    "everything, tp2-pp2-ep2": (*_degrees(tp=2, pp=2, ep=2), *ALL_TRAINED),
    "blocks, pp2-dp2": (*_degrees(pp=2), "stage.train=['*.gated_cross_attention.*']"),
    # On the first stage nothing but the resampler is trained.
    "the end, pp2-dp2": (
        *_degrees(pp=2),
        "stage.train=['resampler.*','decoder.layers.2.gated_cross_attention.*']",
        "optimizer.clip_norm=0.2",
    ),
    "adapters, tp2-pp2-ep2": (*_degrees(tp=2, pp=2, ep=2), *ADAPTERS),
    "adapters, pp2-dp2, deepspeed": (*_degrees(pp=2), *DEEPSPEED, *ADAPTERS),
    "!tp2-pp2-ep2": _degrees(tp=2, pp=2, ep=2),
    "~tp2-pp2-ep2": _degrees(tp=2, pp=2, ep=2),
    "=tp2-pp2": _degrees(tp=2, pp=2),
}


@cache
def answers(world_size: int) -> list[dict[str, list[Any]]]:
    """Of each rank, of every layout; on one process, of what each layout trains."""
    alone = {_trains(name): _train(name) for name in LAYOUTS if name[0] != "="}
    return run_ranks(world_size, vision_phases, LAYOUTS if world_size > 1 else alone, timeout_seconds=840)


@cache
def runs(world_size: int) -> dict[str, list[Outcome]]:
    found = answers(world_size)
    of_layouts = {name: zip(*(answer[name] for answer in found), strict=True) for name in found[0] if name[0] != "="}
    return {name: [assemble(list(each)) for each in phases] for name, phases in of_layouts.items()}


def _train(name: str) -> tuple[str, ...]:
    return tuple(override for override in LAYOUTS[name] if override.startswith(("stage.", "optimizer")))


def _trains(name: str) -> str:
    return (name[0] if name[0] in "!~" else " ") + str(_train(name))


TRAINED = [name for name in LAYOUTS if name[0] not in "!~="]


@pytest.mark.parametrize("name", TRAINED)
def test_losses_gradients_norms_and_clipped_weights_equal_one_process(name: str) -> None:
    (got,), (want,) = runs(4)[name], runs(1)[_trains(name)]
    run = load_run_config([*VISION, *LAYOUTS[name]])
    assert got.problems == [] == want.problems
    assert got.gradients.keys() == want.gradients.keys() == trained_names(run.model, run.stage)
    for parameter, gradient in want.gradients.items():
        # The B of an adapter is 0 in the first step, so A has no gradient yet.
        is_felt = np.abs(gradient).max() > 0 or parameter.endswith("lora_a")
        assert is_felt, f"{parameter}: an open gate lets a gradient through to everything"
        floor = NUMBER_FLOOR * total_norm(want.gradients) if parameter.endswith("_gate") else 0.0
        assert distance(got.gradients[parameter], gradient, floor) <= GRADIENT, parameter
        assert distance(got.weights[parameter], want.weights[parameter]) <= WEIGHT, parameter
    np.testing.assert_allclose(got.norms[:1], want.norms[:1], rtol=NORM)
    # After an update whose rounding differs: 1.3e-6 was measured where three tensors and two gates are all of the norm.
    np.testing.assert_allclose(got.norms[1:], want.norms[1:], rtol=2 * NORM)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-6)
    assert min(want.norms) > run.optimizer.clip_norm, "every step must be clipped for this test to see the norm"


@pytest.mark.parametrize(("world_size", "name"), [(1, "!()"), (4, "!tp2-pp2-ep2")])
def test_with_gates_at_0_the_loss_is_the_text_model_s_to_the_bit(world_size: int, name: str) -> None:
    text, vision, *_ = runs(world_size)[name]
    assert vision.losses == text.losses
    assert vision.problems == []


@pytest.mark.parametrize(("world_size", "name"), [(1, "!()"), (4, "!tp2-pp2-ep2")])
def test_a_changed_image_moves_losses_and_gradients_of_other_documents_by_exactly_0(world_size: int, name: str) -> None:
    assert num_changed(load_run_config([*VISION, *ALONE])) > 500  # bytes of pixels, of 768 of an image
    *_, before, after = runs(world_size)[name]
    assert before.problems == after.problems == []
    assert before.losses == after.losses and before.norms == after.norms
    for parameter, gradient in before.gradients.items():
        np.testing.assert_array_equal(after.gradients[parameter], gradient, err_msg=parameter)


def test_a_rank_makes_all_its_latents_before_the_first_broadcast_and_goes_back_after_the_last_sum() -> None:
    """So no rank waits for another's images. Of eight micro-batches five have images, and each rank makes some."""
    events = [answer["=tp2-pp2"] for answer in answers(4)]
    own = [rank.count("made") for rank in events]
    assert sorted(own) == [1, 1, 1, 2]
    for rank, made in zip(events, own, strict=True):
        shared = sum(own)
        assert rank == ["made"] * made + ["broadcast"] * shared + ["all_reduce"] * shared + ["backward"] * made


def test_in_bf16_a_layout_is_as_near_to_fp32_as_one_process() -> None:
    (got,), (*drawn, exact) = runs(4)["~tp2-pp2-ep2"], runs(1)["~()"]
    assert got.problems == []
    sides, run = bf16.Sides(got, drawn, exact), load_run_config([*VISION, "precision=bf16"])
    found = [*bf16.tensor_differences(sides, run), *bf16.number_differences(sides)]
    assert [item for item in found if item.is_different] == []


def test_images_matter() -> None:
    (alone,) = run_ranks(1, vision_phases, {"?": ()}, timeout_seconds=300)
    seen, again, negative = (assemble([answer]) for answer in alone["?"])
    assert seen.losses == again.losses
    assert abs(seen.losses[0] - negative.losses[0]) > 1e-3
