"""Steps of a vision model on many layouts of one world; with gates at 0; with an image changed."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof import plan, ranks
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.proof.outcome import RankAnswer
from gpt4moe.proof.plan import Phase
from gpt4moe.training import images
from gpt4moe.training.images import ImageLatents
from tests.distributed.case import BASE

# Eight micro-batches of two: two a rank under dp 4, and whole rounds of an interleaved pp 2.
TEXT = (*BASE, "training.global_batch_size=16")
PARTS = (
    "stage=vision", "+vision@model.vision=tiny", "model.vision.encoder.image_size=16",
    "model.vision.encoder.hidden_size=16", "model.vision.encoder.num_layers=1",
    "model.vision.encoder.ffn_hidden_size=16", "model.vision.resampler.num_latents=4",
    "model.vision.cross_attention_every=2", "model.vision.ffn_hidden_size=24",
)  # fmt: skip
VISION = (*TEXT, *PARTS)
ALL_TRAINED = ("stage.train=[]",)
# Nothing pools over a micro-batch, and every expert gets every token (tests.distributed.documents has the reason).
ALONE = (
    "data.document_mask=true", "model.moe.top_k=4", "model.moe.router.load_balancing_coefficient=0",
    "model.moe.router.z_loss_coefficient=0", "stage.train=[]",
)  # fmt: skip
CHANGED = 1
"""The number of the document in its row whose images are changed. Its labels do not count."""
RATE = 0.5


def vision_phases(environment: Environment, layouts: dict[str, tuple[str, ...]]) -> dict[str, list[Any]]:
    """Layout -> the answers of `trained`; of one whose name begins with "!", those of `closed` and `changed`; with "~",
    those of `rounded`; with "?", those of `negative`; with "=", the events of `noted`."""
    found = {}
    with world(environment) as device:
        for name, overrides in layouts.items():
            run = load_run_config([*VISION, *overrides])
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            kinds = {"!": [_closed, _changed], "~": [_rounded], "?": [_negative], "=": [_noted]}
            of: list[Callable[..., list[Any]]] = kinds.get(name[0], [_trained])
            found[name] = [answer for phases in of for answer in phases(overrides, groups)]
    return found


def _trained(overrides: tuple[str, ...], groups: ProcessGroups) -> list[RankAnswer]:
    """Two clipped steps of plain descent; of the second one micro-batch alone has images."""
    return [_run(Phase(run=load_run_config([*VISION, *overrides]), steps=2, descent=RATE), groups)]


def _rounded(overrides: tuple[str, ...], groups: ProcessGroups) -> list[RankAnswer]:
    """Three steps of AdamW in bf16; in one process several times, and once in fp32."""
    run = load_run_config([*VISION, *overrides, "precision=bf16"])
    draws = range(plan.DRAWS if groups.layout.world_size == 1 else 1)
    phases = [
        Phase(run=run, steps=3, every_gradient=True, nudge=plan.ONE_BF16_ROUNDING * (draw > 0), draw=draw)
        for draw in draws
    ]
    if groups.layout.world_size == 1:
        phases.append(Phase(run=load_run_config([*VISION, *overrides]), steps=3, every_gradient=True))
    return [_run(phase, groups) for phase in phases]


def _noted(overrides: tuple[str, ...], groups: ProcessGroups) -> list[str]:
    """What ImageLatents does in one step of this rank, in order: made and backward, of a micro-batch with images; its
    collectives by their names."""
    events: list[str] = []
    make, collectives = ImageLatents._latents, SimpleNamespace(get_global_rank=distributed.get_global_rank)

    def made(self: ImageLatents, *given: Any) -> torch.Tensor | None:
        latents = make(self, *given)
        if latents is not None:
            events.append("made")
            latents.register_hook(lambda gradient: events.append("backward"))
        return latents

    def noting(name: str) -> Callable[..., Any]:
        def collective(*given: Any, **named: Any) -> Any:
            events.append(name)
            return getattr(distributed, name)(*given, **named)

        return collective

    for name in ("broadcast", "all_reduce"):
        setattr(collectives, name, noting(name))
    with patch.object(ImageLatents, "_latents", made), patch.object(images, "distributed", collectives):
        _run(Phase(run=load_run_config([*VISION, *overrides]), steps=1, descent=RATE), groups)
    return events


def _closed(overrides: tuple[str, ...], groups: ProcessGroups) -> list[RankAnswer]:
    """The text model, and the vision model with its gates at 0."""
    runs = [load_run_config([*base, *overrides]) for base in (TEXT, VISION)]
    return [_run(Phase(run=run, steps=1, descent=0.0, gates=0.0), groups) for run in runs]


def _changed(overrides: tuple[str, ...], groups: ProcessGroups) -> list[RankAnswer]:
    """Before and after a change of the images of one document of each row."""
    run, answers = load_run_config([*VISION, *overrides, *ALONE]), []
    for is_changed in (False, True):

        def batches(*given: Any, is_changed: bool = is_changed) -> list[Batch]:
            return [_with_images_changed(batch, is_changed) for batch in synthetic_batches(*given)]

        with patch.object(ranks, "synthetic_batches", batches):
            answers.append(_run(Phase(run=run, steps=1, descent=RATE), groups))
    return answers


def _negative(overrides: tuple[str, ...], groups: ProcessGroups) -> list[RankAnswer]:
    """One step, the same again, and the same with the negative of every image: nothing but pixels differs."""
    run, answers = load_run_config([*VISION, *overrides]), []
    for is_negative in (False, False, True):

        def batches(*given: Any, is_negative: bool = is_negative) -> list[Batch]:
            made = synthetic_batches(*given)
            if not is_negative:
                return made
            return [
                batch if batch.pixels is None else dataclasses.replace(batch, pixels=255 - batch.pixels)
                for batch in made
            ]

        with patch.object(ranks, "synthetic_batches", batches):
            answers.append(_run(Phase(run=run, steps=1, descent=0.0), groups))
    return answers


def _with_images_changed(batch: Batch, is_changed: bool) -> Batch:
    assert batch.documents is not None
    batch.loss_mask[batch.documents == CHANGED] = 0.0
    if batch.image_rows is None or not is_changed:
        return batch
    assert batch.media is not None and batch.pixels is not None and batch.image_frames is not None
    ends = batch.image_frames.cumsum(0).tolist()
    place = torch.arange(len(batch.image_rows)) - torch.searchsorted(batch.image_rows, batch.image_rows)
    pixels = batch.pixels.clone()
    for image, row in enumerate(batch.image_rows.tolist()):
        if (batch.documents[row, batch.media[row] == place[image] + 1] == CHANGED).any():
            start = ends[image] - int(batch.image_frames[image])
            pixels[start : ends[image]] = 255 - pixels[start : ends[image]]
    return dataclasses.replace(batch, pixels=pixels)


def num_changed(run: RunConfig) -> int:
    """How many pixels of the step's images the change moves; on one process."""
    batches = synthetic_batches(run, 1, 1, 0)
    pairs = [(batch.pixels, _with_images_changed(batch, True).pixels) for batch in batches]
    return sum(int((a != b).sum()) for a, b in pairs if a is not None and b is not None)


def _run(phase: Phase, groups: ProcessGroups) -> RankAnswer:
    return ranks._run_phase(phase, groups, None, str)
