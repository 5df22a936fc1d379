"""load_weights: weights and buffers of any checkpoint onto the chunks of any layout, with or without an engine.

    chunks, groups --parameters.shards, buffers--> which part of which logical tensor each is --reader.fill--> values

Training (whole and weights only), inference and a reference policy load by this one function. It belongs to `model`
because only the model knows which part of a logical tensor a parameter is. Checkpoints lie above this room, so the
reader is an argument (TensorReader), and nothing here imports theirs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.shard import BUFFER, WEIGHT, Shard

Target = tuple[str, Shard, int, int, Tensor]
"""(KIND/NAME, shard, start, end, out): elements [start, end) of the shard (C order) go into `out`, flat"""


class TensorReader(Protocol):
    """What load_weights wants of a checkpoint (checkpoint.reader.CheckpointReader has it)."""

    def fill_all(self, targets: Iterable[Target]) -> None:
        """Copies the stored values of every target into its place, in any order.

        Raises: CheckpointError when a tensor is absent, of another shape, or damaged.
        """


class OwnedElements(Protocol):
    """Elements [start, end) of a parameter (C order) that an optimizer owns (training.engine.OwnedRange)."""

    @property
    def parameter(self) -> nn.Parameter: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def master(self) -> Tensor:
        """fp32, flat, as the states are."""

    @property
    def states(self) -> Mapping[str, Tensor]:
        """The optimizer's state tensors by name."""


def load_weights(
    reader: TensorReader,
    chunks: list[Any],
    groups: ProcessGroups,
    *,
    names: Collection[str] | None = None,
    owned: Iterable[OwnedElements] | None = None,
    with_states: bool = False,
) -> None:
    """Fills the weights and buffers of this rank's chunks. Collective at its end.

    Args:
        chunks: GPTModels, wrapped or not, of any dtype: values are cast to it.
        names: KIND/NAME of the weights and buffers to fill; the others stay as they are. None: all.
        owned: fill these masters in place of the chunks' trained parameters, which are the masters' cast: call
            Engine.finish_load next, which copies them. Frozen ones have no masters and are filled themselves. None:
            there is no optimizer.
        with_states: fill the optimizer's states of what is owned too.
    Raises: CheckpointError on every rank when any finds a tensor absent, of another shape, or damaged.
    """
    with raise_together(groups):
        reader.fill_all(
            (f"{kind}/{shard.name}", shard, start, end, out.detach().view(-1))
            for kind, shard, start, end, out in _all_targets(chunks, groups, owned, with_states=with_states)
            # A state goes with its weight.
            if names is None or f"{BUFFER if kind == BUFFER else WEIGHT}/{shard.name}" in names
        )


def _all_targets(
    chunks: list[Any], groups: ProcessGroups, owned: Iterable[OwnedElements] | None, *, with_states: bool
) -> Iterator[Target]:
    """With the kind in place of KIND/NAME."""
    places = {id(parameter): (shard, parameter) for parameter, shard, _ in shards(chunks, groups)}
    if owned is not None:
        yield from _owned_targets(owned, places, with_states=with_states)
    for shard, parameter in places.values():
        if owned is None or not parameter.requires_grad:
            yield WEIGHT, shard, 0, shard.size, parameter
    for buffer, shard in buffers(chunks, groups):
        yield BUFFER, shard, 0, shard.size, buffer


def _owned_targets(
    owned: Iterable[OwnedElements], places: dict[int, tuple[Shard, nn.Parameter]], *, with_states: bool
) -> Iterator[Target]:
    for part in owned:
        shard, _ = places[id(part.parameter)]
        yield WEIGHT, shard, part.start, part.end, part.master
        for state, values in part.states.items() if with_states else ():
            yield state, shard, part.start, part.end, values
