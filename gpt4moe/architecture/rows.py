"""TensorRow: one line of the table of tensors (table.py), and the words that its columns use. No torch.

name      what the tensor is called          embedding.word_embeddings.weight
family    what it is compared together with  embedding; its component is what parameters are counted by
shape     of the logical tensor              [V, H]
cut       over which ranks, along which dim  rows: dimension 0 over tp
initial   its first value                    normal with model.init_std
present   which models have it               all
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from gpt4moe.config.model import ModelConfig

Shape = tuple[int, ...]


class Component(str, Enum):
    """What parameters are counted by."""

    embedding = "embedding"
    attention = "attention"
    dense_mlp = "dense_mlp"
    router = "router"
    experts = "experts"
    shared_experts = "shared_experts"
    norms = "norms"
    output_layer = "output_layer"
    gated_cross_attention = "gated_cross_attention"
    resampler = "resampler"


class Family(Enum):
    """Tensors that are compared together, in the order of the forward pass: (name for people, component)."""

    embedding = "embedding", Component.embedding
    resampler = "resampler", Component.resampler
    gates = "gates of cross-attention", Component.gated_cross_attention
    gated_norm = "norms of gated blocks", Component.gated_cross_attention
    gated_attention = "gated cross-attention", Component.gated_cross_attention
    gated_mlp = "mlp of gated blocks", Component.gated_cross_attention
    input_norm = "norm before attention", Component.norms
    qkv = "attention qkv", Component.attention
    head_norms = "query and key norms", Component.norms
    attention_out = "attention out", Component.attention
    mlp_norm = "norm before mlp", Component.norms
    router = "router", Component.router
    shared_experts = "shared experts", Component.shared_experts
    experts_gate_up = "experts gate and up", Component.experts
    experts_down = "experts down", Component.experts
    dense_gate_up = "dense gate and up", Component.dense_mlp
    dense_down = "dense down", Component.dense_mlp
    final_norm = "final norm", Component.norms
    output_layer = "output layer", Component.output_layer

    @property
    def label(self) -> str:
        return str(self.value[0])

    @property
    def component(self) -> Component:
        return self.value[1]


class Spread(Enum):
    """Which ranks of a pipeline stage divide a tensor."""

    whole = "every rank holds all of it"
    tp = "cut over tp"
    experts = "cut over ep x etp"


class Cut(Enum):
    """How ranks divide a tensor: (in words, dimension of the logical tensor -> axis of ranks)."""

    whole = "every rank of a stage holds all of it", ()
    everywhere = "every rank of every stage holds all of it, and the whole gradient", ()
    rows = "dim 0 over tp", ((0, "tp"),)
    columns = "dim 1 over tp", ((1, "tp"),)
    gated_rows = "[2F, H]: the same rows of gate and up over tp", ((1, "tp"),)
    experts_gated = "[L, 2F, H]: experts over ep, the same rows of gate and up over etp", ((0, "ep"), (2, "etp"))
    experts = "[L, H, F]: experts over ep, columns over etp", ((0, "ep"), (2, "etp"))
    experts_whole = "[L, ...]: experts over ep, each whole on every rank of etp", ((0, "ep"),)

    @property
    def words(self) -> str:
        return str(self.value[0])

    @property
    def axes(self) -> dict[int, str]:
        """Dimension of the logical tensor -> the axis of ranks that cuts it."""
        return dict(self.value[1])

    @property
    def is_gated(self) -> bool:
        """Whether a rank stores gate and up as one dimension [2F], which the logical tensor has as [2, F]."""
        return self in (Cut.gated_rows, Cut.experts_gated)

    @property
    def spread(self) -> Spread:
        return _SPREAD[self]


_SPREAD = {cut: Spread.experts if "ep" in cut.axes.values() else Spread.tp if cut.axes else Spread.whole for cut in Cut}


class Initial(Enum):
    """The initial value."""

    ones = "1"
    normal = "normal, init_std"
    residual = "normal, init_std / sqrt(2 * num_layers): it adds to the residual stream"
    by_input = "normal, 1 / sqrt(3 * in): the deviation of torch's own linear layers and of PEFT's adapters"
    unit = "normal, 1"
    zeros = "0"


Has = Callable[[ModelConfig], bool]


def always(_: ModelConfig) -> bool:
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRow:
    """One row of the table."""

    name: str
    """In a layer: without `decoder.layers.<number>.`."""
    family: Family
    shape: Callable[[ModelConfig], Shape]
    """Of the logical tensor, over all ranks."""
    cut: Cut
    initial: Initial | None
    """None: the planner counts the tensor, the trainer cannot build it."""
    present: Has = always
    """Whether a model that has this part (attention, MLP) has the tensor."""
    is_matrix: bool = True
    """Whether tokens are multiplied by it. False for norms, biases, sinks and the embedding."""
    is_stored_first: bool = False
    """Checkpoints and converted folders list it before the other tensors of its attention or MLP."""
    pieces: Callable[[ModelConfig], tuple[str, int]] | None = None
    """(key, number) that tp of inference must divide; None: the length of the cut dimension."""


def _hidden(model: ModelConfig) -> int:
    return model.hidden_size


def norm_rows(
    name: str, family: Family, width: Callable[[ModelConfig], int] = _hidden, *, present: Has = always,
    initial: Initial | None = Initial.ones,
) -> tuple[TensorRow, TensorRow]:  # fmt: skip
    """The weight `name` of a norm, and its bias, which only LayerNorm has."""

    def has_bias(model: ModelConfig) -> bool:
        return present(model) and model.planned is not None and model.planned.norm_biases

    weight = TensorRow(name=name, family=family, shape=lambda m: (width(m),), cut=Cut.whole, initial=initial,
                 present=present, is_matrix=False)  # fmt: skip
    return weight, replace(weight, name=_bias(name), initial=None, present=has_bias)


def linear_rows(weight: TensorRow, has_bias: Has) -> tuple[TensorRow, TensorRow]:
    """A matrix [..., out, in] and, if the model has biases, its bias [..., out], cut like the matrix."""
    bias = TensorRow(
        name=_bias(weight.name), family=weight.family, shape=lambda m: weight.shape(m)[:-1], cut=weight.cut,
        initial=None, present=has_bias, is_matrix=False,
    )  # fmt: skip
    return weight, bias


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"
