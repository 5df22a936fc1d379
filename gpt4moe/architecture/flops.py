"""Floating-point operations of one token of training: layers, head, attention, and what is computed again.

A product with a matrix of n elements takes 2n forward and 4n backward: 6N in all (arXiv:2204.02311, appendix B).
Attention's scores are causal: a token sees half the sequence on average, and only that half is counted.

Where weights are frozen less is computed: 2n forward, 2n for the gradient of a matrix's input if anything before it is
trained, 2n for its own gradient if it is trained.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gpt4moe.architecture.count import active_size
from gpt4moe.architecture.rows import Component
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.architecture.tensors import ModelTensor, embedding_tensors, layer_tensors, output_tensors
from gpt4moe.architecture.trained import is_adapter
from gpt4moe.architecture.vision import RESAMPLER, is_vision, reads_latents
from gpt4moe.config.model import LayerKind, ModelConfig
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.parallel.placement import stage_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsPerToken:
    """Forward and backward, FLOP."""

    layers: float
    """6 x the matrix elements that a token uses in the layers: the "6N" of reports."""
    head: float
    """6 x the output layer's elements."""
    attention: float
    """Scores and their product with values, causal, in every layer."""
    recompute: float
    """What the backward pass computes a second time. MFU does not count it."""

    @property
    def model(self) -> float:
        """What MFU counts: layers, head and attention, without recomputation."""
        return self.layers + self.head + self.attention

    @property
    def hardware(self) -> float:
        """What the devices compute, with recomputation."""
        return self.model + self.recompute


def flops_per_token(
    model: ModelConfig, parallel: ParallelConfig | None = None, *, trained: Collection[str] | None = None
) -> FlopsPerToken:
    """FLOP of one token of a sequence of model.seq_length.

    Args:
        parallel: says what is computed again, and in which layers of a stage. None: nothing is.
        trained: names of the trained tensors (architecture.trained); None: all. What is computed again is counted as
            if all were.
    """
    passes = Passes() if trained is None else passes_of(model, trained)
    again = recomputed_layers(model, parallel) if parallel else set()
    of_kind: dict[tuple[LayerKind, bool], dict[Component, float]] = {}
    layers = attention = recompute = 0.0
    for layer, kind in enumerate((it, model.has_gated_block(at)) for at, it in enumerate(model.layer_kinds)):
        if kind not in of_kind:
            of_kind[kind] = _layer_rows(model, layer, Passes())
        rows, scores = of_kind[kind], 3.0 * layer_attention_flops(model, layer)
        layers += sum((rows if trained is None else _layer_rows(model, layer, passes)).values())
        attention += scores if layer not in passes.forward_attention else scores / 3
        if parallel and layer in again:
            recompute += _recomputed(parallel.recompute, rows, scores)
    head = passes.head.flops * model.vocab_size * model.hidden_size  # a tied one multiplies too
    return FlopsPerToken(layers=layers, head=head, attention=attention, recompute=recompute)


def recomputed_layers(model: ModelConfig, parallel: ParallelConfig) -> set[int]:
    """Global indices of the layers that parallel.recompute is for: all, or the first few of each virtual stage."""
    return {layer for chunk in stage_layers(model.num_layers, parallel) for layer in chunk[: parallel.recompute_layers]}


def attention_flops(model: ModelConfig) -> float:
    """Forward FLOP of scores and weighted values of one token, over all layers."""
    return sum(layer_attention_flops(model, layer) for layer in range(model.num_layers))


def layer_attention_flops(model: ModelConfig, layer: int) -> float:
    """The same of one layer.

    Args:
        layer: its global index.
    """
    width = ATTENTION[model.layer_kinds[layer].attention].score_width(model)
    return 2.0 * model.num_attention_heads * width * tokens_seen(model, layer)


def tokens_seen(model: ModelConfig, layer: int) -> float:
    """Tokens that a token of a layer attends to, on average over the sequence: half of it, or a window of w of S
    tokens (w - w^2 / 2S) in every second layer."""
    width = min(window_of(model, layer) or model.seq_length, model.seq_length)
    return width - width**2 / (2 * model.seq_length)


def window_of(model: ModelConfig, layer: int) -> int | None:
    """Tokens that a layer's attention is limited to; None: all before."""
    return model.planned.sliding_window if model.planned and layer % 2 == 0 else None


@dataclass(frozen=True, slots=True)
class Gradients:
    """Which products the backward pass makes with one matrix."""

    of_input: bool = True
    of_weight: bool = True

    @property
    def flops(self) -> float:
        """FLOP of a token for each element, forward and backward: 2, 4 or 6."""
        return 2.0 + 2.0 * self.of_input + 2.0 * self.of_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """The products of a backward pass where some weights are frozen."""

    of_tensor: Mapping[str, Gradients] = field(default_factory=dict)
    """By name; both products for what is not in it."""
    head: Gradients = field(default_factory=Gradients)
    forward_attention: frozenset[int] = frozenset()
    """Layers whose scores have no backward pass."""


def passes_of(model: ModelConfig, trained: Collection[str]) -> Passes:
    """The input of a tensor needs a gradient if any before it in the forward pass is trained. A router stands before
    the experts, whose first matrix does not depend on it: counted as if it did. The resampler stands before the keys
    and values of the first gated block, and so before all behind it."""
    of_tensor: dict[str, Gradients] = {}
    latents_are_trained = any(name.startswith(RESAMPLER) for name in trained)
    forward_attention: set[int] = set()
    is_trained = any(tensor.name in trained for tensor in embedding_tensors(model))
    for layer in range(model.num_layers):
        forward_attention.add(layer)
        for tensor in _forward_order(layer_tensors(model, layer)):
            of_tensor[tensor.name] = Gradients(is_trained, tensor.name in trained)
            if tensor.component is Component.attention and tensor.is_matrix and not is_adapter(tensor) and is_trained:
                forward_attention.discard(layer)  # the last one that counts is the projection behind the scores
            is_trained |= tensor.name in trained or (latents_are_trained and reads_latents(tensor.name))
    output = output_tensors(model)
    matrix = next((tensor for tensor in output if tensor.is_matrix), next(iter(embedding_tensors(model))))
    is_trained = is_trained or any(tensor.name in trained for tensor in output if tensor is not matrix)
    head = Gradients(is_trained, matrix.name in trained)
    return Passes(of_tensor=of_tensor, head=head, forward_attention=frozenset(forward_attention))


def _forward_order(tensors: list[ModelTensor]) -> list[ModelTensor]:
    """A gated block stands before its layer. Megatron registers attention's projection behind the scores first."""
    gated, own = ([tensor for tensor in tensors if is_vision(tensor.name) is it] for it in (True, False))
    others = [tensor for tensor in own if ".linear_proj." not in tensor.name]
    end = 1 + max(place for place, tensor in enumerate(others) if tensor.component is Component.attention)
    projection = [tensor for tensor in own if ".linear_proj." in tensor.name]
    return [*gated, *others[:end], *projection, *others[end:]]


def _layer_rows(model: ModelConfig, layer: int, passes: Passes) -> dict[Component, float]:
    """Forward and backward FLOP of a layer's matrices for one token, by component; of adapters, if passes has them."""
    rows = dict.fromkeys(Component, 0.0)
    for tensor in layer_tensors(model, layer):
        if tensor.is_matrix or (is_adapter(tensor) and tensor.name in passes.of_tensor):
            rows[tensor.component] += passes.of_tensor.get(tensor.name, Gradients()).flops * active_size(model, tensor)
    return rows


def _recomputed(recompute: Recompute, rows: dict[Component, float], attention: float) -> float:
    """What one layer computes again, in FLOP. A forward pass is a third of forward and backward. Experts compute two of
    their three matrix products again: nobody needs the result of the last one."""
    return {
        Recompute.none: 0.0,
        Recompute.selective: attention / 3,
        Recompute.moe: rows[Component.experts] / 3 * 2 / 3,
        Recompute.full: (sum(rows.values()) + attention) / 3,
    }[recompute]
