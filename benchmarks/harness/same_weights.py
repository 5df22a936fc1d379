"""Gives a peer's model the weights of one of ours, so that both compute the same and send each token to the same
experts. With weights of its own, Mixtral leaves up to half of `tiny`'s experts without a token and computes the rest in
few large products: other work, and faster."""

from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.config.model import ModelConfig
from gpt4moe.convert.rules import links
from gpt4moe.convert.tables import MIXTRAL_FUSED
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.groups import ProcessGroups


@torch.no_grad()
def fill_mixtral(theirs: nn.Module, chunks: list[Any], model: ModelConfig, groups: ProcessGroups) -> None:
    """By the names and cuts of the conversion. Only of ranks that have the whole model."""
    ours = {shard.name: parameter.view(shard.shape) for parameter, shard, _ in shards(chunks, groups)}
    left = dict(theirs.named_parameters())
    for link in links(MIXTRAL_FUSED, {name: tuple(value.shape) for name, value in ours.items()}, model):
        boxes = [
            ours[link.ours][tuple(slice(at, at + size) for at, size in zip(*box, strict=True))] for box in link.boxes
        ]
        left.pop(link.theirs).copy_(torch.cat([box.flatten() for box in boxes]).view(link.shape))
    assert not left, f"weights that gpt4moe does not have: {sorted(left)}"


@torch.no_grad()
def fill_megatron(theirs: nn.Module, chunks: list[Any]) -> None:
    """This rank's part of Megatron's own model, cut as ours is: its experts are modules, ours one tensor."""
    (chunk,) = chunks
    ours = dict(getattr(chunk, "module", chunk).named_parameters())
    for name, parameter in theirs.named_parameters():
        parameter.copy_(_of_megatron(ours, name))


def _of_megatron(ours: dict[str, Tensor], name: str) -> Tensor:
    layer, is_expert, rest = name.partition("experts.local_experts.")
    if not is_expert:
        return ours[name]
    number, linear = rest.split(".")[:2]
    return ours[f"{layer}experts.{ {'linear_fc1': 'gate_up', 'linear_fc2': 'down'}[linear] }"][int(number)]
