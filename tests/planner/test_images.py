"""What images cost, against what is built and run: bytes that autograd keeps, parameters, FLOP of torch's counter."""

import dataclasses
from functools import cache
from itertools import accumulate
from typing import Any

import pytest

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.architecture.image_flops import encoder_parameters, image_flops
from gpt4moe.config.load import load_plan_config, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.estimate import estimate, timed_work
from gpt4moe.planner.image_time import latents_seconds
from gpt4moe.planner.images import encoder_workspace, image_memory
from gpt4moe.planner.memory import live_activations
from gpt4moe.planner.micro_batch import MicroBatch
from gpt4moe.planner.plan_json import to_json
from gpt4moe.planner.step_time import heaviest_stage
from tests.planner.test_memory import WIDE, kept_bytes
from tests.spawn import run_ranks

IMAGES = 2
VISION = (
    *WIDE, "stage=vision", "+vision@model.vision=tiny", "model.vision.cross_attention_every=2",
    "model.vision.ffn_hidden_size=96", "training.global_batch_size=8",
)  # fmt: skip
# Ranks and overrides on top of VISION.
KEPT: dict[str, tuple[int, tuple[str, ...]]] = {
    "frozen, bf16": (1, ("precision=bf16",)),
    "frozen, grouped products, query and key norms": (1, (
        "precision=bf16", "kernels.experts=grouped_mm", "model.qk_norm=true", "model.head_dim=32",
    )),
    "all trained": (1, ("stage.train=[]",)),
    "the blocks alone": (1, ("stage.train=['*.gated_cross_attention.*']",)),
    "the resampler alone": (1, ("stage.train=['resampler.*']", "optimizer.by_pattern=[]", "precision=bf16")),
    "frozen, dense between, shared experts, bf16": (1, (
        "model.moe.layer_pattern=[0,1,0,1]", "model.ffn_hidden_size=96", "precision=bf16",
        "model.moe.shared_expert_ffn_hidden_size=96",
    )),
    "frozen, tp2-pp2-ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "frozen, cp2, recompute selective": (2, ("parallel.cp=2", "parallel.ep=2", "parallel.recompute=selective")),
}  # fmt: skip


def of_two_images(run: RunConfig, dp: int, dp_index: int) -> list[Any]:
    """The micro-batches of one rank, two still images a row."""
    import torch

    from gpt4moe.proof.batches import synthetic_batches

    assert run.model.vision is not None
    side = run.model.vision.encoder.image_size
    text = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=None))
    rows, length = run.training.micro_batch_size, run.model.seq_length
    media = (torch.arange(length) * IMAGES // length + 1).repeat(rows, 1)
    images = {
        "media": media,
        "pixels": torch.zeros(rows * IMAGES, 3, side, side, dtype=torch.uint8),
        "image_frames": torch.ones(rows * IMAGES, dtype=torch.int64),
        "image_rows": torch.arange(rows).repeat_interleave(IMAGES),
    }
    return [dataclasses.replace(batch, **images) for batch in synthetic_batches(text, 1, dp, dp_index)]


def _kept(environment: Environment, names: list[str]) -> dict[str, tuple[int, float]]:
    from gpt4moe.parallel.groups import ProcessGroups, world

    answers = {}
    with world(environment) as device:
        for name in names:
            run = load_run_config([*VISION, *KEPT[name][1]])
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            answers[name] = kept_bytes(run, groups, of_two_images(run, layout.dp, groups.coordinate["dp"]))
    return answers


@cache
def kept_of_ranks(world_size: int) -> list[dict[str, tuple[int, float]]]:
    names = [name for name, (ranks, _) in KEPT.items() if ranks == world_size]
    return run_ranks(world_size, _kept, names)


@pytest.mark.parametrize("name", KEPT)
def test_activations_latents_and_resampler_are_within_5_percent_of_what_autograd_keeps(name: str) -> None:
    world_size, overrides = KEPT[name]
    run = load_run_config([*VISION, *overrides])
    layout = Layout.from_config(run.parallel, world_size)
    for rank, answers in enumerate(kept_of_ranks(world_size)):
        kept, imbalance = answers[name]
        micro = dataclasses.replace(MicroBatch.of(run, layout, imbalance), images=IMAGES)
        images = image_memory(run, layout, micro)
        assert images is not None
        trains = name != "the blocks alone"
        planned = live_activations(run, layout, micro)[layout.coordinate(rank)["pp"]] + images.resampler
        planned += images.latents // (2 if trains else 1)  # autograd keeps the latents, not their gradients
        assert planned == pytest.approx(kept, rel=0.05), rank


def _counted(environment: Environment) -> dict[str, float]:
    """Parameters and FLOP of torch's counter, of objects that training builds; of two images of one row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gpt4moe.config.optimizer import Dtype
    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.parameters import vision_chunk
    from gpt4moe.model.transformer_config import TORCH_DTYPES
    from gpt4moe.model.vision_encoder import FrozenEncoder
    from tests.moe.case import rank_groups

    found: dict[str, float] = {}

    def flops(name: str, work: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = work()
        counts = counter.get_flop_counts()["Global"]
        found[f"{name} products"] = sum(n for operation, n in counts.items() if "attention" not in str(operation))
        return result

    with rank_groups(environment) as groups:
        run = load_run_config([*VISION, "model.num_layers=1"])
        assert run.model.vision is not None
        encoder = FrozenEncoder(run.model.vision.encoder, 1, groups.device, TORCH_DTYPES[Dtype.fp32])
        found["encoder parameters"] = sum(p.numel() for p in encoder.model.parameters())
        side = run.model.vision.encoder.image_size
        pixels = torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8)
        features = flops("encoder", lambda: encoder.features(pixels))
        chunks = build_model(run, groups)
        resampler, layer = vision_chunk(chunks), chunks[0].decoder.layers[0].gated_cross_attention
        made = flops("resampler", lambda: resampler(features, [1] * IMAGES))
        flops("resampler backward", lambda: made.sum().backward())
        length = run.model.seq_length
        hidden = torch.zeros(length, 1, run.model.hidden_size, requires_grad=True)
        latents = torch.zeros(IMAGES * made.shape[1], 1, made.shape[2], requires_grad=True)
        media = torch.ones(1, length, dtype=torch.int64)
        with torch.no_grad():
            layer.attention_gate.fill_(1.0)
            layer.mlp_gate.fill_(1.0)
        out = flops("gated", lambda: layer(hidden, latents, media))
        flops("gated backward", lambda: out.sum().backward())
    return found


def test_parameters_and_products_of_encoder_resampler_and_blocks_are_what_torch_counts() -> None:
    """Scores apart, which the counter takes 2.5 times backward where the planner takes 2."""
    (counted,) = run_ranks(1, _counted)
    run = load_run_config([*VISION, "model.num_layers=1"])
    model, vision = run.model, run.model.vision
    assert vision is not None
    assert counted["encoder parameters"] == encoder_parameters(vision.encoder)
    flops, patches, width = image_flops(model, IMAGES), 16, vision.width
    scores = IMAGES * vision.encoder.num_layers * 4 * patches**2 * width
    assert counted["encoder products"] == flops.encoder - scores
    latents = vision.resampler.num_latents
    scores = IMAGES * vision.resampler.num_layers * 4 * latents * (patches + latents) * width
    assert counted["resampler products"] == flops.resampler / 3 - scores
    assert counted["resampler backward products"] == 2 * counted["resampler products"]
    text = dataclasses.replace(model, vision=None)
    of_tokens = (flops_per_token(model).layers - flops_per_token(text).layers) * model.seq_length
    scores = 3 * 4 * model.seq_length * IMAGES * latents * model.num_attention_heads * model.head_size
    whole = counted["gated products"] + counted["gated backward products"]
    assert whole == flops.gated - scores + of_tokens


# Where the largest temporaries are those of normalising, of attention, of the MLP.
ENCODERS = {
    "normalising": ("image_size=64", "patch_size=32", "precision=bf16"),
    "attention": ("image_size=64", "hidden_size=128", "ffn_hidden_size=128"),
    "MLP": ("image_size=64", "ffn_hidden_size=384", "precision=bf16"),
}  # fmt: skip


def encoder_run(name: str) -> RunConfig:
    words = [word if word.startswith("precision") else f"model.vision.encoder.{word}" for word in ENCODERS[name]]
    return load_run_config([*VISION, *words])


def _peaks(environment: Environment) -> dict[str, int]:
    """The most bytes that an encoder's forward pass has at once, by every allocation but a convolution's own."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from gpt4moe.model.transformer_config import TORCH_DTYPES
    from gpt4moe.model.vision_encoder import FrozenEncoder

    found = {}
    for name in ENCODERS:
        run = encoder_run(name)
        assert run.model.vision is not None
        side = run.model.vision.encoder.image_size
        encoder = FrozenEncoder(run.model.vision.encoder, 1, torch.device("cpu"), TORCH_DTYPES[run.precision.dtype])
        pixels = torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            encoder.features(pixels)
        assert seen.profiler is not None and seen.profiler.kineto_results is not None
        found[name] = max(accumulate(_kept_sizes(seen.profiler.kineto_results.events())))
    return found


def _kept_sizes(events: list[Any]) -> list[int]:
    """Bytes of each allocation (above 0) and release (below), but for what a convolution frees before it ends: whether
    it copies weights and pixels, and how wide, is up to the CPU's instructions."""
    ((start, end),) = ((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "aten::conv2d")
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns())
    during = [e.nbytes() for e in memory if start <= e.start_ns() <= end]
    for released in [size for size in during if size < 0]:
        if -released in during:
            during.remove(-released)
            during.remove(released)
    before = [e.nbytes() for e in memory if e.start_ns() < start]
    return [*before, *during, *(e.nbytes() for e in memory if e.start_ns() > end)]


def test_the_encoder_s_temporaries_are_within_5_percent_of_what_its_forward_pass_allocates() -> None:
    (peaks,) = run_ranks(1, _peaks)
    for name, peak in peaks.items():
        run = encoder_run(name)
        layout = Layout.from_config(run.parallel, 1)
        micro = dataclasses.replace(MicroBatch.of(run, layout, 1.0), batch=1, images=IMAGES)
        assert encoder_workspace(micro, IMAGES) == pytest.approx(peak, rel=0.05), name


def test_a_frozen_model_takes_less_time_and_sums_and_saves_what_is_trained_alone() -> None:
    plan = load_plan_config(["+experiment=gpt4_vision"])
    whole = dataclasses.replace(plan, stage=dataclasses.replace(plan.stage, train=[]))
    work, all_work = timed_work(plan), timed_work(whole)
    assert sum(heaviest_stage(work)) * 20 < sum(heaviest_stage(all_work))
    ours, theirs = estimate(plan), estimate(whole)
    # Two products of three, and forward once more where layers are recomputed.
    assert 0.6 < ours.step.parts["products"] / theirs.step.parts["products"] < 0.85
    assert ours.flops.layers < 0.75 * theirs.flops.layers
    assert ours.peak_memory_bytes < theirs.peak_memory_bytes / 1.5


def test_images_cost_memory_and_time_and_are_stated() -> None:
    few, many = (load_plan_config(["+experiment=gpt4_vision", f"images_per_sequence={images}"]) for images in (8, 32))
    plain, more = estimate(few), estimate(many)
    assert more.step.parts["images"] > 2 * plain.step.parts["images"]
    assert more.memory[0].images_bytes > 2 * plain.memory[0].images_bytes > 0
    assert latents_seconds(timed_work(many)) > 3 * latents_seconds(timed_work(few))
    answer: Any = to_json(plain)
    assert answer["images"]["per_sequence"] == 8
    assert answer["images"]["encoder_parameters"] == 412_987_248
    stage = answer["memory"]["per_stage"][0]
    assert sum(value for name, value in stage.items() if name != "total_bytes") == stage["total_bytes"]
    text = estimate(load_plan_config(["+experiment=gpt4"]))
    assert "images" not in text.step.parts and text.memory[0].images_bytes == 0 and text.images is None


@pytest.mark.parametrize("images", ["0", "33", "nan"])
def test_a_number_of_images_that_no_sequence_has_is_refused(images: str) -> None:
    with pytest.raises(ConfigError, match="images_per_sequence"):
        load_plan_config(["+experiment=gpt4_vision", f"images_per_sequence={images}"])


def test_images_of_a_text_model_are_refused() -> None:
    plan = load_plan_config(["+experiment=gpt4"])
    with pytest.raises(ConfigError, match="a text model reads no images"):
        plan.require_used(["images_per_sequence"])
