"""The tensors of one model: the rows of the table (table.py) that its configuration has. No torch.

Two orders:
    as Megatron registers them   embedding_tensors, layer_tensors, output_tensors, model_tensors: gradient buffers
    as checkpoints list them     logical_shapes, logical_buffers: manifests, files of conversions
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from gpt4moe.architecture.adapters import ADAPTABLE, adapter_rows, is_adapted
from gpt4moe.architecture.names import ROUTER_MODULE, layer_name, split_name
from gpt4moe.architecture.rows import Component, Cut, Family, Shape, Spread, TensorRow
from gpt4moe.architecture.table import (
    ATTENTION,
    EMBEDDING_ROWS,
    INPUT_NORM_ROWS,
    MLP,
    MLP_NORM_ROWS,
    OUTPUT,
    layer_parts,
)
from gpt4moe.architecture.vision import GATED_ROWS, find_resampler_row, resampler_rows
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig

Box = tuple[Shape, Shape]
"""(offset, shape) of a rectangle of a logical tensor."""


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A tensor of a model, whole."""

    name: str
    """The logical name: layers by their index in the whole model."""
    shape: Shape
    row: TensorRow
    component: Component
    spread: Spread

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied by it."""
        return self.row.is_matrix

    def local_size(self, parallel: ParallelConfig) -> int:
        """Elements that one rank holds."""
        if self.spread is Spread.whole:
            return self.size
        if self.row.cut is Cut.experts_whole:
            return self.size // parallel.ep
        return self.size // (parallel.tp if self.spread is Spread.tp else parallel.ep * parallel.etp)


def embedding_tensors(model: ModelConfig) -> list[ModelTensor]:
    return _tensors(model, EMBEDDING_ROWS)


def layer_tensors(model: ModelConfig, layer: int) -> list[ModelTensor]:
    """The tensors of one layer.

    Args:
        layer: its global index, from 0.
    """
    parts = layer_parts(model.layer_kinds[layer])
    gated = _tensors(model, GATED_ROWS, layer) if model.has_gated_block(layer) else []
    return [t for part in parts for t in _tensors(model, part, layer)] + gated


def output_tensors(model: ModelConfig) -> list[ModelTensor]:
    """The final norm and the output layer (none where it is the embedding)."""
    return _tensors(model, OUTPUT)


def resampler_tensors(model: ModelConfig) -> list[ModelTensor]:
    """Of a vision model: what turns the features of images into latents. Every rank of every stage has all of it."""
    return _tensors(model, resampler_rows(model))


def model_tensors(model: ModelConfig) -> Iterator[ModelTensor]:
    """All of them, in the order in which Megatron registers them; the resampler, a chunk of its own, last."""
    yield from embedding_tensors(model)
    for layer in range(model.num_layers):
        yield from layer_tensors(model, layer)
    yield from output_tensors(model)
    yield from resampler_tensors(model)


def logical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor, in the order in which checkpoints and converted folders list them."""
    found = embedding_tensors(model)
    for layer, kind in enumerate(model.layer_kinds):
        for part in layer_parts(kind):
            listed = sorted(part, key=lambda row: not row.is_stored_first)
            found += _tensors(model, listed, layer)
        found += _tensors(model, GATED_ROWS, layer) if model.has_gated_block(layer) else []
    found += output_tensors(model) + resampler_tensors(model)
    return {tensor.name: tensor.shape for tensor in found}


def logical_buffers(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of the state that no gradient moves, as checkpoints list it.

    A router declares its buffers in config.moe (ROUTER_TRAITS): fp32, [E], in each layer with experts, whole and equal
    on every rank of a pipeline stage.
    """
    return dict(_buffers(model, is_for_inference=False))


def routing_buffers(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of the buffers that inference needs, because the forward pass reads them."""
    return dict(_buffers(model, is_for_inference=True))


def _buffers(model: ModelConfig, *, is_for_inference: bool) -> Iterator[tuple[str, Shape]]:
    if model.moe is None:
        return
    buffers = [buffer for buffer in model.moe.router.buffers if buffer.steers_routing or not is_for_inference]
    for layer, kind in enumerate(model.layer_kinds):
        for buffer in buffers if kind.has_experts else ():
            yield layer_name(layer, f"{ROUTER_MODULE}.{buffer.name}"), (model.moe.num_experts,)


@dataclass(frozen=True, slots=True)
class InferenceCut:
    """How the tp ranks of inference divide a tensor: experts whole, attention between query groups."""

    axis: int
    """The dimension of the logical tensor that is cut: the first one that training cuts."""
    what: str
    count: int
    """Pieces along it, which tp must divide; `what` names them."""


def inference_cut(model: ModelConfig, name: str, shape: Shape) -> InferenceCut | None:
    """How a tensor is cut; None: every rank of its stage has all of it (as of a router's buffers)."""
    row = find_row(name)
    axis = min(row.cut.axes, default=None) if row is not None else None
    if row is None or axis is None or axis == len(shape):  # a bias of a matrix that is cut along its input is whole
        return None
    what, count = row.pieces(model) if row.pieces else (f"dimension of {shape[axis]} of {name}", shape[axis])
    return InferenceCut(axis, f"{what}={count}" if row.pieces else what, count)


def row_of(name: str) -> TensorRow:
    """The row of a tensor's logical name. A parameter that the table does not know is a programming error."""
    row = find_row(name)
    assert row is not None, f"{name} is not in the table of tensors (architecture.table)"
    return row


def find_row(name: str) -> TensorRow | None:
    """The row of a tensor's logical name; None: the table does not know it."""
    layer, rest = split_name(name)
    rows = _outside_rows() if layer is None else _layer_rows()
    return next((row for row in rows if row.name == rest), None) or find_resampler_row(name)


def has_spread(name: str, spread: Spread) -> bool:
    """Whether the table knows a tensor by its logical name, and ranks divide it so."""
    row = find_row(name)
    return row is not None and row.cut.spread is spread


def family_of(name: str) -> Family | None:
    """The family of a tensor or of a router's buffer, by its logical name; None: the table does not know it."""
    row = find_row(name)
    if row is not None:
        return row.family
    return Family.router if split_name(name)[1].startswith(f"{ROUTER_MODULE}.") else None


def _outside_rows() -> Iterator[TensorRow]:
    yield from EMBEDDING_ROWS
    yield from OUTPUT


def _layer_rows() -> Iterator[TensorRow]:
    """Of every kind, and their adapters. Kinds may share a name: its rows then have the same cut (a test holds it)."""
    yield from INPUT_NORM_ROWS
    for attention in ATTENTION.values():
        yield from attention.rows
    yield from MLP_NORM_ROWS
    for rows in MLP.values():
        yield from rows
    for adapters in ADAPTERS.values():
        yield from adapters
    yield from GATED_ROWS


def _tensors(
    model: ModelConfig, rows: tuple[TensorRow, ...] | list[TensorRow], layer: int | None = None
) -> list[ModelTensor]:
    found = []
    for row in rows:
        if row.present(model):
            tensor = _tensor(model, row, layer)
            found.append(tensor)
            if layer is not None and is_adapted(model, tensor.name, row):
                found += [_tensor(model, adapter, layer) for adapter in ADAPTERS[row.name]]
    return found


def _tensor(model: ModelConfig, row: TensorRow, layer: int | None) -> ModelTensor:
    name = row.name if layer is None else layer_name(layer, row.name)
    return ModelTensor(name, row.shape(model), row, row.family.component, row.cut.spread)


_ROWS = [row for rows in (*(attention.rows for attention in ATTENTION.values()), *MLP.values()) for row in rows]
ADAPTERS = {row.name: adapter_rows(row) for row in _ROWS if row.name in ADAPTABLE and row.initial is not None}
"""Name of a matrix within its layer -> the rows of its adapter."""
