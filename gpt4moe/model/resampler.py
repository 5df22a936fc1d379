"""Perceiver Resampler: a fixed number of latents from the features of an image or a clip (arXiv:2204.14198, A.1.1).

    features [F * P, D] of F frames, with time embeddings if F > 1
    latents  [L, D] -> each layer: attend to features and latents, MLP -> norm -> [L, D]

It equals the one of transformers' Idefics to round-off. It is a chunk of its own beside the language model's, with a
copy on every rank: any rank can make the latents of any image (training.images).
"""

from collections import defaultdict
from typing import Any

import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from gpt4moe.config.vision import VisionConfig


class VisionChunk(MegatronModule):  # type: ignore[misc]
    """What engines wrap and checkpoints name: its tensors are called `resampler.*`."""

    def __init__(self, config: Any, vision: VisionConfig):
        super().__init__(config)
        self.resampler = Resampler(vision).to(config.params_dtype)

    def forward(self, features: Tensor, image_frames: list[int]) -> Tensor:
        return self.resampler(features, image_frames)


class Resampler(nn.Module):
    """Letters: N images, L latents, D the encoder's width, P patches of a frame."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        settings, width = vision.resampler, vision.width
        self.latents = nn.Parameter(torch.empty(settings.num_latents, width))
        if settings.max_frames > 1:
            self.time_embeddings = nn.Parameter(torch.empty(settings.max_frames, width))
        self.layers = nn.ModuleList(
            ResamplerLayer(width, settings.num_attention_heads, vision.resampler_ffn)
            for _ in range(settings.num_layers)
        )
        self.final_layernorm = nn.LayerNorm(width)

    def forward(self, features: Tensor, image_frames: list[int]) -> Tensor:
        """Latents of images, [N, L, D].

        Args:
            features: of every frame of every image, [frames, P, D].
            image_frames: frames of each of the N images, in order.
        """
        starts, by_count = 0, defaultdict[int, list[tuple[int, Tensor]]](list)
        for image, count in enumerate(image_frames):
            by_count[count].append((image, features[starts : starts + count]))
            starts += count
        made: dict[int, Tensor] = {}
        for count, images in by_count.items():  # without padding: images of equally many frames go together
            latents = self._of_equal_length(torch.stack([x for _, x in images]), count)
            made |= {image: latents[place] for place, (image, _) in enumerate(images)}
        return torch.stack([made[image] for image in range(len(image_frames))])

    def _of_equal_length(self, features: Tensor, frames: int) -> Tensor:
        """[N, frames, P, D] -> [N, L, D]"""
        if frames > 1:
            features = features + self.time_embeddings[:frames, None]
        features = features.flatten(1, 2)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.final_layernorm(latents)


class ResamplerLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, ffn_hidden_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.context_layernorm = nn.LayerNorm(width)
        self.latents_layernorm = nn.LayerNorm(width)
        self.linear_q = nn.Linear(width, width, bias=False)
        self.linear_kv = nn.Linear(width, 2 * width, bias=False)
        self.linear_proj = nn.Linear(width, width, bias=False)
        self.mlp_layernorm = nn.LayerNorm(width)
        self.linear_fc1 = nn.Linear(width, ffn_hidden_size, bias=False)
        self.linear_fc2 = nn.Linear(ffn_hidden_size, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """latents [N, L, D], features [N, F, D] -> [N, L, D]. Keys and values are of the features and the latents."""
        normed = self.latents_layernorm(latents)
        key, value = self.linear_kv(torch.cat((self.context_layernorm(features), normed), dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.linear_q(normed), key, value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents = latents + self.linear_proj(attended)
        return latents + self.linear_fc2(nn.functional.relu(self.linear_fc1(self.mlp_layernorm(latents))))
