"""Latents of a step's images, beside the pipeline schedule: made once before it, their gradients collected after it.

    before   rank r of tp x pp has micro-batches r, r + tp * pp, ...: pixels -> encoder, no gradient -> resampler
             then, micro-batch by micro-batch, broadcast over tp x pp: every stage has [images * L, B, W]
    schedule every gated block of every stage attends to them; each stage adds to their gradient
    after    sums over pp of all micro-batches' gradients
             then each rank: backward through the resampler of its own micro-batches
             sum of the resampler's gradients over tp x pp, then over dp x cp as those of any weight

So each image passes encoder and resampler once. A rank makes the latents of all its micro-batches before the first
broadcast, and goes back through the resampler after the last sum: no rank waits for another's images, so tp x pp ranks
share this work of a step at the same time.

Memory: the latents of every micro-batch and their gradients are on every rank during the schedule, and the resampler's
graph of a rank's own micro-batches from `make` to `finish`: of one micro-batch in tp * pp.

Every tp rank has the whole gradient of the latents (model.gated_attention); under cp each has that of its tokens, and
the last sum adds them up.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.parameters import vision_chunk
from gpt4moe.model.transformer_config import TORCH_DTYPES
from gpt4moe.model.vision_encoder import FrozenEncoder
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine import Engine


def own_micro_batches(groups: ProcessGroups) -> slice:
    """Which of a step's micro-batches this rank encodes the images of; the only ones that it needs pixels of."""
    return slice(groups.model.rank(), None, groups.model.size())


class ImageLatents:
    """Owns the encoder as long as a run lasts, and the latents of a step from `make` to `finish`."""

    def __init__(self, run: RunConfig, engine: Engine, groups: ProcessGroups):
        assert run.model.vision is not None
        self.vision, self.groups, self.engine = run.model.vision, groups, engine
        self.chunk = vision_chunk(engine.chunks)
        self.dtype = TORCH_DTYPES[run.precision.dtype]
        self.encoder = FrozenEncoder(self.vision.encoder, run.run.seed, groups.device, self.dtype)
        self.is_trained = any(parameter.requires_grad for parameter in self.chunk.parameters())
        self._step: list[tuple[Tensor, Tensor | None]] = []
        """Of each micro-batch with images that gradients are wanted of: latents as the blocks get them; the same with
        the graph of the resampler, on the rank that made them."""

    def make(self, on_host: list[Batch], batches: list[Batch], *, with_gradient: bool) -> list[dict[str, Any]]:
        """The further arguments of a chunk's forward call for each micro-batch. Collective over tp x pp.

        Args:
            on_host: this rank's micro-batches on the CPU, not cut over cp: what shapes follow from, without waiting.
            batches: the same on its device; pixels are needed of own_micro_batches alone.
        """
        model, keeps = self.groups.model, with_gradient and self.is_trained
        given = [torch.zeros(self._shape(host), dtype=self.dtype, device=self.groups.device) for host in on_host]
        graphs: list[Tensor | None] = [None] * len(given)
        for index in range(len(given))[own_micro_batches(self.groups)]:
            with nullcontext() if keeps else torch.no_grad():
                made = self._latents(on_host[index], batches[index])
            if made is not None:
                given[index].copy_(made.detach())
                graphs[index] = made if keeps else None
        pictured = [index for index, host in enumerate(on_host) if host.image_rows is not None]
        for index in pictured if model.size() > 1 else []:
            source = distributed.get_global_rank(model, index % model.size())
            distributed.broadcast(given[index], source, group=model)
        self._step = [(given[index], graphs[index]) for index in pictured] if keeps else []
        # Without images too: what hangs on the latents must have a gradient in every micro-batch.
        return [{"context": latents.requires_grad_(keeps)} for latents in given]

    def finish(self) -> None:
        """After the schedule: the gradients of the resampler, reduced. Collective."""
        if not self.is_trained:
            return
        gradients = [torch.zeros_like(given) if given.grad is None else given.grad for given, _ in self._step]
        for gradient in gradients if self.groups.pp.size() > 1 else []:
            distributed.all_reduce(gradient, group=self.groups.pp)
        with getattr(self.chunk, "no_sync", nullcontext)():
            for gradient, (_, made) in zip(gradients, self._step, strict=True):
                if made is not None:
                    made.backward(gradient)
        self._step = []
        self.engine.sum_copies(self.chunk)

    def _latents(self, host: Batch, batch: Batch) -> Tensor | None:
        """[images * L, B, W] of one micro-batch; None: it has no images."""
        if host.image_rows is None:
            return None
        assert batch.pixels is not None and host.image_frames is not None and batch.image_rows is not None
        latents = self.chunk(self.encoder.features(batch.pixels), host.image_frames.tolist())
        positions, rows, width = self._shape(host)
        whole = latents.new_zeros(rows, positions // latents.shape[1], latents.shape[1], width)
        whole = whole.index_put((batch.image_rows, _place_in_row(batch.image_rows)), latents)
        return whole.permute(1, 2, 0, 3).flatten(0, 1)

    def _shape(self, batch: Batch) -> tuple[int, int, int]:
        """Of a micro-batch's latents, [images * L, B, W]. Every row has as many images as the one that has most."""
        most = 1 if batch.image_rows is None else int(_place_in_row(batch.image_rows).max()) + 1
        return most * self.vision.resampler.num_latents, len(batch.tokens), self.vision.width


def _place_in_row(image_rows: Tensor) -> Tensor:
    """Of each image its number within its row, from 0. `image_rows` never falls."""
    return torch.arange(len(image_rows), device=image_rows.device) - torch.searchsorted(image_rows, image_rows)
