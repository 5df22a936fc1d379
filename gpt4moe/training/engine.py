"""Engine: the interface by which the training step reduces gradients and updates weights; code that engines share.

The global gradient norm and clipping are one rule for every engine:

    each element of the model's gradient once -> sum of squares in fp64 -> all ranks -> norm -> one factor for all

The libraries' own norms are not used. Megatron-core 0.16.1 sums in fp32 on CPUs, which has an error of 1e-5 at two
million elements. That is more than a change of layout may change the norm. DeepSpeed 0.19.8 counts experts wrongly if
tp > 1, and its norm is a collective over groups that a pipeline stage without experts does not call.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.distributed import finalize_model_grads
from torch import Tensor, distributed, nn

from gpt4moe.architecture.trained import tensor_settings
from gpt4moe.config.optimizer import OptimizerKind, TensorSettings
from gpt4moe.config.optimizer_table import Optimizer
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.groups import ProcessGroups


@dataclass(frozen=True, slots=True)
class OwnedRange:
    """The elements [start, end) of a parameter (C order) that this rank's optimizer owns; all tensors flat, fp32."""

    parameter: nn.Parameter
    start: int
    end: int
    master: Tensor
    """The fp32 weights of the range."""
    states: dict[str, Tensor]
    """The optimizer's state tensors, by their names in config.optimizer_table."""

    @property
    def gradient(self) -> Tensor:
        """The gradient of the global batch, summed over all ranks; valid after Engine.reduce."""
        assert self.master.grad is not None
        return self.master.grad


class Engine(Protocol):
    """What every engine gives. The training step (training.update) calls, in this order:

    zero_gradients -> Megatron's schedule over `chunks` -> reduce -> norm -> clip -> update

    The forward pass of `chunks` sees the updated weights. Who reads them otherwise calls finish_update first.
    """

    chunks: list[Any]
    """Wrapped GPTModels, one per virtual stage, with Megatron's config as .config; then the resampler's chunk of a
    vision model, which the schedule does not run."""

    def zero_gradients(self) -> None: ...

    def reduce(self) -> None:
        """Makes the global batch's gradients ready in `owned`. Collective, unless the schedule has reduced already."""

    def sum_copies(self, chunk: Any) -> None:
        """Sums the gradients of a chunk that every rank of tp x pp has a copy of (the resampler's) over these ranks,
        and makes them ready for `reduce`. Called after the schedule, with the wrapped chunk. Collective."""

    def norm(self) -> float:
        """The global norm of the reduced gradients, the same on every rank. Collective."""

    def clip(self, norm: float) -> None:
        """Scales the gradients, whose global norm is `norm`, down to the configured norm."""

    def update(self, learning_rate: float) -> None:
        """One optimizer step from the reduced gradients; afterwards every rank has the new weights, or will have them
        (finish_update). Collective."""

    def finish_update(self) -> None:
        """Waits until every rank's weights are here that an update still gathers."""

    def owned(self) -> Iterator[OwnedRange]:
        """What this rank's optimizer owns. The ranges of all data-parallel ranks are disjoint and cover everything."""

    def finish_load(self, step: int) -> None:
        """Sets the step count and the model's weights, after masters and states were filled. Collective."""


def check_states(
    kind: OptimizerKind, row: Optimizer, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    """Compares the states of an optimizer's row with those that its class keeps, by one update of two elements.

    An engine fills the states that the row names, and a checkpoint has only those: any other state would begin anew at
    each launch.

    Raises: ConfigError when the class keeps a state that the row does not name, or the row names one of another kind.
    """
    with torch.device("cpu"), torch.enable_grad():
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        optimizer = make([parameter])
        optimizer.step()
    kept = {name: torch.as_tensor(value) for name, value in optimizer.state[parameter].items() if value is not None}
    elementwise = {name for name, value in kept.items() if value.shape == parameter.shape}
    counts = {name for name, value in kept.items() if value.numel() == 1 and value.item() == 1}
    named = {*row.states, *filter(None, [row.step_name])}
    if set(kept) != named or not set(row.states) <= elementwise or row.step_name not in {None, *counts}:
        raise ConfigError(
            f"optimizer.kind={kind.value}: {type(optimizer).__name__} keeps {_listed(kept)} for a parameter (one value "
            f"for each element: {_listed(elementwise)}), but its row in config/optimizer_table.py has "
            f"states={row.states} and step_name={row.step_name!r}.",
            "Name in `states` what has one value for each element and in `step_name` the count of updates. An "
            "optimizer that keeps anything else cannot be stored; choose another optimizer.kind.",
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def finalize(chunks: list[Any], num_tokens: Any = None, **groups: Any) -> None:
    """Megatron's end of a schedule, without its division by tokens: the loss already carries its scale.

    It reduces the chunks' gradients over data-parallel ranks, sums over tp where each tensor-parallel rank saw a part,
    and sums the two copies of tied embeddings.
    """
    finalize_model_grads(chunks, None, **groups)


def parameter_settings(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[int, TensorSettings]:
    """Id of a parameter -> its entry of optimizer.by_pattern, of those that have one.

    Raises: ConfigError, as architecture.trained.tensor_settings.
    """
    by_name = tensor_settings(run.model, run.stage, run.optimizer)
    return {
        id(parameter): by_name[shard.name] for parameter, shard, _ in shards(chunks, groups) if shard.name in by_name
    }


def own_keys(settings: TensorSettings | None) -> dict[str, float]:
    """The keys of an optimizer's parameter group that an entry of optimizer.by_pattern sets."""
    if settings is None:
        return {}
    decay = {} if settings.weight_decay is None else {"weight_decay": settings.weight_decay}
    return {"lr_factor": settings.lr_factor, **decay}


def counted_parameters(chunks: list[Any], groups: ProcessGroups) -> set[int]:
    """Ids of the parameters that this rank counts in the gradient norm: each tensor counts on one rank alone, so copies
    over tp and the second copy of a tied embedding are left out."""
    return {id(parameter) for parameter, shard, _ in shards(chunks, groups) if shard.is_writer}


NORM_PIECE = 1 << 24
"""Elements whose squares are summed by one call. On a CPU each call copies its elements to fp64: 128 MB at most."""


def sum_of_squares(values: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements, exact to fp64: a scalar, fp64, on their device (CPU if there is none).

    torch.linalg.vector_norm(dtype=float64) would copy a whole tensor to fp64 first, on GPUs too: 8 bytes for each
    element. torch._foreach_norm makes no copy on a GPU, and takes all tensors in a few kernels. On a CPU it copies one
    piece at a time. fp32 sums of short rows were tried: they miss the norm by 3e-7.

    Args:
        values: flat, fp32, all on one device.
    """
    pieces = [piece for value in values if value.numel() for piece in value.split(NORM_PIECE)]
    if not pieces:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)).square_().sum()


def gradient_norm(owned: Iterable[OwnedRange], counted: set[int], device: torch.device) -> float:
    """The global norm of the reduced gradients, the same on every rank. Collective over the world.

    Args:
        owned: Engine.owned of this rank.
        counted: counted_parameters of this rank.
    """
    square = sum_of_squares(part.gradient for part in owned if id(part.parameter) in counted).to(device)
    distributed.all_reduce(square)
    return float(square.sqrt())


def clip_gradients(owned: Iterable[OwnedRange], norm: float, clip_norm: float) -> None:
    """Scales the reduced gradients, whose global norm is `norm`, down to a norm of `clip_norm`; 0: no clipping."""
    if 0 < clip_norm < norm + 1e-6:
        gradients = [part.gradient for part in owned]
        if gradients:
            torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))
