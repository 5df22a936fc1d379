"""Logical names: layers are found by module, whatever other parts of a model are called."""

import torch
from torch import nn

from gpt4moe.model.parameters import _named, buffers, decoder_layers


class _Layer(nn.Module):
    def __init__(self, layer_number: int):
        super().__init__()
        self.layer_number = layer_number
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))


class _Chunk(nn.Module):
    """The second stage of a model of four layers, with another part that has layers too."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList(_Layer(number) for number in (1, 2))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_Layer(number) for number in (3, 4))


class _Wrapped(nn.Module):
    """As an engine wraps a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.module = _Chunk()


def test_layers_of_another_part_are_not_the_decoders() -> None:
    for chunk in (_Chunk(), _Wrapped()):
        assert list(decoder_layers(chunk)) == [2, 3]
        names = [name for name, _ in _named(chunk, lambda module: module.named_parameters())]
        assert names == [
            "vision.layers.0.weight", "vision.layers.1.weight", "decoder.layers.2.weight", "decoder.layers.3.weight"
        ]  # fmt: skip


def test_buffers_are_named_as_parameters_are() -> None:
    class Groups:
        coordinate = dict.fromkeys(("tp", "cp", "dp"), 0)

    found = buffers([_Wrapped()], Groups())  # type: ignore[arg-type]
    assert [shard.name for _, shard in found] == [
        "vision.layers.0.seen", "vision.layers.1.seen", "decoder.layers.2.seen", "decoder.layers.3.seen"
    ]  # fmt: skip
