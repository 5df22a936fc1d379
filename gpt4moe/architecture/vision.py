"""Rows of the vision parts (config.vision): the gated block before a layer, and the resampler. No torch.

    decoder.layers.4.gated_cross_attention.linear_q.weight   a gated block, in every n-th layer
    resampler.layers.0.linear_q.weight                       the resampler: a copy on every rank of every stage

A gated block is as wide as the language model; its keys and values come from latents, as wide as the encoder. Matrices
begin as torch's own linear layers do, because these parts begin to learn when the language model has ended.
"""

from collections.abc import Callable
from dataclasses import replace

from gpt4moe.architecture.rows import Cut, Family, Initial, Shape, TensorRow, norm_rows
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.vision import VisionConfig

RESAMPLER = "resampler."
_LAYERS = f"{RESAMPLER}layers."
BLOCK = "gated_cross_attention"
"""Module of a gated block within its layer."""
PATTERNS = (f"{RESAMPLER}*", f"*.{BLOCK}.*")
"""Of the names of all vision parts."""


def _vision(model: ModelConfig) -> VisionConfig:
    assert model.vision is not None
    return model.vision


def _heads_width(model: ModelConfig) -> int:
    return model.num_attention_heads * model.head_size


def _gate(name: str) -> TensorRow:
    return TensorRow(name=f"{BLOCK}.{name}", family=Family.gates, shape=lambda m: (1,), cut=Cut.whole,
                     initial=Initial.zeros, is_matrix=False)  # fmt: skip


GATED_ROWS = (
    _gate("attention_gate"),
    _gate("mlp_gate"),
    *norm_rows(f"{BLOCK}.input_layernorm.weight", Family.gated_norm),
    TensorRow(name=f"{BLOCK}.linear_q.weight", family=Family.gated_attention, cut=Cut.rows, initial=Initial.by_input,
              shape=lambda m: (_heads_width(m), m.hidden_size)),
    # Rows: for each head its key, its value. So tp can cut dim 0. No matrix to the planner: latents pass it, not text.
    TensorRow(name=f"{BLOCK}.linear_kv.weight", family=Family.gated_attention, cut=Cut.rows, initial=Initial.by_input,
              shape=lambda m: (2 * _heads_width(m), _vision(m).width), is_matrix=False),
    TensorRow(name=f"{BLOCK}.linear_proj.weight", family=Family.gated_attention, cut=Cut.columns,
              initial=Initial.by_input, shape=lambda m: (m.hidden_size, _heads_width(m))),
    *norm_rows(f"{BLOCK}.pre_mlp_layernorm.weight", Family.gated_norm),
    TensorRow(name=f"{BLOCK}.linear_fc1.weight", family=Family.gated_mlp, cut=Cut.gated_rows,
              initial=Initial.by_input, shape=lambda m: (2, _vision(m).ffn_hidden_size, m.hidden_size)),
    TensorRow(name=f"{BLOCK}.linear_fc2.weight", family=Family.gated_mlp, cut=Cut.columns, initial=Initial.by_input,
              shape=lambda m: (m.hidden_size, _vision(m).ffn_hidden_size)),
)  # fmt: skip
"""Of a layer that has a gated block, behind its other rows."""


def _everywhere(name: str, shape: Callable[[ModelConfig], Shape], initial: Initial = Initial.by_input) -> TensorRow:
    return TensorRow(
        name=name, family=Family.resampler, shape=shape, cut=Cut.everywhere, initial=initial, is_matrix=False
    )


def _norm(name: str) -> tuple[TensorRow, TensorRow]:
    """LayerNorm, with a bias, as transformers' Idefics has it."""
    return (
        _everywhere(f"{name}.weight", lambda m: (_vision(m).width,), Initial.ones),
        _everywhere(f"{name}.bias", lambda m: (_vision(m).width,), Initial.zeros),
    )


_HEAD = (
    _everywhere(f"{RESAMPLER}latents", lambda m: (_vision(m).resampler.num_latents, _vision(m).width), Initial.unit),
    replace(
        _everywhere(f"{RESAMPLER}time_embeddings", lambda m: (_vision(m).resampler.max_frames, _vision(m).width),
                    Initial.normal),
        present=lambda m: _vision(m).resampler.max_frames > 1,
    ),
)  # fmt: skip
_LAYER = (
    *_norm("context_layernorm"),
    *_norm("latents_layernorm"),
    _everywhere("linear_q.weight", lambda m: (_vision(m).width, _vision(m).width)),
    _everywhere("linear_kv.weight", lambda m: (2 * _vision(m).width, _vision(m).width)),
    _everywhere("linear_proj.weight", lambda m: (_vision(m).width, _vision(m).width)),
    *_norm("mlp_layernorm"),
    _everywhere("linear_fc1.weight", lambda m: (_vision(m).resampler_ffn, _vision(m).width)),
    _everywhere("linear_fc2.weight", lambda m: (_vision(m).width, _vision(m).resampler_ffn)),
)
_TAIL = _norm(f"{RESAMPLER}final_layernorm")


def resampler_rows(model: ModelConfig) -> list[TensorRow]:
    """Of the whole resampler, with its layers' numbers in their names; none of a text model."""
    if model.vision is None:
        return []
    layers = range(model.vision.resampler.num_layers)
    numbered = [replace(row, name=f"{_LAYERS}{layer}.{row.name}") for layer in layers for row in _LAYER]
    return [*_HEAD, *numbered, *_TAIL]


def find_resampler_row(name: str) -> TensorRow | None:
    """The row of a tensor of the resampler by its logical name, without its number where it is of a layer."""
    rows: tuple[TensorRow, ...] = (*_HEAD, *_TAIL)
    rest = name
    if name.startswith(_LAYERS):
        rows, rest = _LAYER, name.removeprefix(_LAYERS).partition(".")[2]
    return next((row for row in rows if row.name == rest), None)


def is_vision(name: str) -> bool:
    """Whether a tensor, by its logical name, is of the vision parts."""
    return name.startswith(RESAMPLER) or f".{BLOCK}." in name


def reads_latents(name: str) -> bool:
    """Whether a tensor, by its logical name, is multiplied by latents: keys and values of a gated block."""
    return name.endswith(f".{BLOCK}.linear_kv.weight")
