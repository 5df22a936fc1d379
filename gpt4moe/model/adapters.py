"""Adapters (LoRA) of a rank's chunk: makes their matrices, and what they add to Megatron's linear layers.

    column (qkv, gate and up)   x [S/tp] -> A x [S/tp, B, r] -> gathered over tp [S] -> B of this rank [S, B, out/tp]
    row (out, down)             x [S] of this rank -> A x, a part of the sum -> reduce-scattered [S/tp, B, r] -> B

Only `rank` numbers a token travel over tp. A of a column and B of a row are whole on every rank and see other tokens on
each: their gradients are summed over tp as those of norms are (parameters.mark). Experts add theirs in moe.experts.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from gpt4moe.architecture.adapters import is_adapted
from gpt4moe.architecture.names import adapter_names, split_name
from gpt4moe.architecture.tensors import layer_tensors
from gpt4moe.config.model import ModelConfig
from gpt4moe.errors import ConfigError
from gpt4moe.model.parameters import decoder_layers
from gpt4moe.moe.experts import Experts


def attach(chunk: nn.Module, model: ModelConfig) -> None:
    """Makes the adapters of every target in a chunk's layers, without values, on the current torch device.

    Raises: ConfigError when a target is no module here that can have one.
    """
    if model.lora is None:
        return
    for index, layer in decoder_layers(chunk).items():
        for tensor in layer_tensors(model, index):
            if is_adapted(model, tensor.name, tensor.row):
                _attach(layer, split_name(tensor.name)[1], model.lora.rank, model.lora.scale)


def _attach(layer: nn.Module, name: str, rank: int, scale: float) -> None:
    path, _, last = name.rpartition(".")
    module: Any = layer.get_submodule(path)
    if not isinstance(module, Adapted | Experts):
        raise ConfigError(
            f"stage.lora: {name} is a {type(module).__name__}, which adds no adapter.",
            "This is a mistake in the program: please report it, and leave the matrix out of stage.lora.targets.",
        )
    module.adapter_scale = scale
    assert isinstance(module, nn.Module)
    weight = getattr(module, last)
    *lead, out, width = weight.shape
    shapes = (*lead, rank, width), (*lead, out, rank)
    for adapter, shape in zip(adapter_names(name), shapes, strict=True):
        values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        module.register_parameter(adapter.rpartition(".")[2], nn.Parameter(values))


class Adapted:
    """A linear layer of Megatron's that may have an adapter."""

    adapter_scale = 0.0
    """alpha / rank; 0: there is no adapter."""
    tp_group: Any
    sequence_parallel: bool
    lora_a: Tensor
    lora_b: Tensor

    def added_to_columns(self, x: Tensor) -> Tensor:
        """x [S/tp, B, in] -> what the adapter adds, [S, B, out/tp]."""
        narrow = nn.functional.linear(x, self.lora_a)
        if self.sequence_parallel:
            narrow = mappings.gather_from_sequence_parallel_region(narrow, group=self.tp_group)
        return nn.functional.linear(narrow, self.lora_b) * self.adapter_scale

    def added_to_rows(self, x: Tensor) -> Tensor:
        """x [S, B, in/tp] -> what the adapter adds, [S/tp, B, out]."""
        narrow = nn.functional.linear(x, self.lora_a)
        if self.sequence_parallel:
            narrow = mappings.reduce_scatter_to_sequence_parallel_region(narrow, group=self.tp_group)
        elif self.tp_group.size() > 1:
            narrow = mappings.reduce_from_tensor_model_parallel_region(narrow, group=self.tp_group)
        return nn.functional.linear(narrow, self.lora_b) * self.adapter_scale
