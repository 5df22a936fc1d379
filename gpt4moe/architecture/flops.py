"""Floating-point operations of one token of training: layers, head, attention, and what is computed again.

A product with a matrix of n elements takes 2n forward and 4n backward: 6N in all (arXiv:2204.02311, appendix B).
Attention's scores are causal: a token sees half the sequence on average, and only that half is counted.
"""

from dataclasses import dataclass

from gpt4moe.architecture.count import active_size
from gpt4moe.architecture.rows import Component
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.architecture.tensors import layer_tensors
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


def flops_per_token(model: ModelConfig, parallel: ParallelConfig | None = None) -> FlopsPerToken:
    """FLOP of one token of a sequence of model.seq_length.

    Args:
        parallel: says what is computed again, and in which layers of a stage. None: nothing is.
    """
    again = recomputed_layers(model, parallel) if parallel else set()
    of_kind: dict[LayerKind, dict[Component, float]] = {}
    layers = attention = recompute = 0.0
    for layer, kind in enumerate(model.layer_kinds):
        if kind not in of_kind:
            of_kind[kind] = _layer_rows(model, layer)
        rows, scores = of_kind[kind], 3.0 * layer_attention_flops(model, layer)
        layers += sum(rows.values())
        attention += scores
        if parallel and layer in again:
            recompute += _recomputed(parallel.recompute, rows, scores)
    head = 6.0 * model.vocab_size * model.hidden_size  # a tied one multiplies too
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


def _layer_rows(model: ModelConfig, layer: int) -> dict[Component, float]:
    """Forward and backward FLOP of a layer's matrices for one token, by component."""
    rows = dict.fromkeys(Component, 0.0)
    for tensor in layer_tensors(model, layer):
        if tensor.is_matrix:
            rows[tensor.component] += 6.0 * active_size(model, tensor)
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
