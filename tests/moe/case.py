"""A small expert-parallel layer in a rank of tests/spawn.py, with the same weights however its experts are spread."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.config.moe import MoEConfig, RouterConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout

HIDDEN, FFN = 16, 24


@contextmanager
def rank_groups(environment: Environment, **degrees: int) -> Iterator[ProcessGroups]:
    """This rank's groups under parallel.<degree>=<size>."""
    with world(environment) as device:
        layout = Layout.from_config(ParallelConfig(**degrees), environment.world_size)
        yield ProcessGroups.create(layout, environment.rank, device, seed=1)


def moe_config(num_experts: int, top_k: int, **router: Any) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, ffn_hidden_size=FFN, top_k=top_k, router=RouterConfig(**router))


def build_layer(
    groups: ProcessGroups, moe: MoEConfig, kernel: ExpertKernel = ExpertKernel.per_expert, *, padded: bool = False,
    config: Any = None,
) -> ExpertParallelMLP:  # fmt: skip
    """The layer with weights drawn for all experts, of which this rank keeps its own.

    Args:
        config: Megatron's, which shared experts need (on one rank, with weights of their own start).
    """
    config = config or SimpleNamespace(hidden_size=HIDDEN, params_dtype=torch.float32, use_cpu_initialization=True)
    layer = ExpertParallelMLP(config, moe, kernel, groups)
    layer.dispatcher.want_aligned = lambda rows: padded
    num_local, first = layer.dispatcher.num_local, layer.dispatcher.num_local * groups.ep.rank()
    generator = torch.Generator().manual_seed(0)
    whole = {
        layer.router.weight: (moe.num_experts, HIDDEN),
        layer.experts.gate_up: (moe.num_experts, 2 * FFN, HIDDEN),
        layer.experts.down: (moe.num_experts, HIDDEN, FFN),
    }
    with torch.no_grad():
        for parameter, shape in whole.items():
            values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
            parameter.copy_(values if parameter is layer.router.weight else values[first : first + num_local])
    return layer


def tokens(seq_length: int, batch: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """An input that wants a gradient and an output gradient, both [S, B, H]."""
    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = torch.randn(2, seq_length, batch, HIDDEN, generator=generator).unbind()
    return hidden.requires_grad_(), gradient


def as_arrays(named: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """For the pipe home: a tensor's memory would go with its process."""
    return {name: value.detach().numpy().copy() for name, value in named.items()}


def relative(got: Any, wanted: Any) -> float:
    """Norm of the difference over the norm of what is wanted."""
    got, wanted = torch.as_tensor(got).double(), torch.as_tensor(wanted).double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
