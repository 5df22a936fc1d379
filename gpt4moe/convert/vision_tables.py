"""Names of the vision parts' tensors: ours, and those of transformers' Idefics without its first `model.`. No torch.

    resampler.layers.0.linear_q.weight                       perceiver_resampler.blocks.0.0.q_proj.weight
    decoder.layers.8.gated_cross_attention.linear_q.weight   gated_cross_attn_layers.1.cross_attn.q_proj.weight

Idefics numbers its gated blocks 0, 1, 2, ...; with model.vision.cross_attention_every=8 they stand before layers 0, 8,
16. It has no time embeddings of frames: `perceiver_resampler.time_embeddings` is a name of ours.
"""

from collections.abc import Iterator

from gpt4moe.architecture.names import split_name
from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import Box, logical_shapes
from gpt4moe.architecture.vision import RESAMPLER, is_vision
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.vision import VisionConfig
from gpt4moe.convert.rules import Link, NameRow, Parts, gate_up, whole

_LAYERS = f"{RESAMPLER}layers."
TIME_EMBEDDINGS = f"{RESAMPLER}time_embeddings"


def keys_and_values_by_head(shape: Shape, model: ModelConfig) -> Parts:
    """`{part}` k, v of a gated block. Our rows are, per head, its key, its value."""
    size = model.head_size
    for number, part in enumerate("kv"):
        boxes: list[Box] = [
            (((2 * head + number) * size, 0), (size, shape[1])) for head in range(model.num_attention_heads)
        ]
        yield {"part": part}, (shape[0] // 2, shape[1]), boxes


def keys_then_values(shape: Shape, model: ModelConfig) -> Parts:
    """`{part}` k, v of the resampler."""
    half = (shape[0] // 2, shape[1])
    for number, part in enumerate("kv"):
        yield {"part": part}, half, [((number * half[0], 0), half)]


def _norm(ours: str, theirs: str) -> tuple[NameRow, NameRow]:
    return NameRow(f"{ours}.weight", whole, f"{theirs}.weight"), NameRow(f"{ours}.bias", whole, f"{theirs}.bias")


_BLOCK = "gated_cross_attn_layers.{number}"
_RESAMPLED = "perceiver_resampler"
_ATTENTION, _MLP = f"{_RESAMPLED}.blocks.{{number}}.0", f"{_RESAMPLED}.blocks.{{number}}.1"
_ROWS = (
    NameRow("gated_cross_attention.attention_gate", whole, f"{_BLOCK}.alpha_cross_attn"),
    NameRow("gated_cross_attention.mlp_gate", whole, f"{_BLOCK}.alpha_dense"),
    NameRow("gated_cross_attention.input_layernorm.weight", whole, f"{_BLOCK}.input_layernorm.weight"),
    NameRow("gated_cross_attention.linear_q.weight", whole, f"{_BLOCK}.cross_attn.q_proj.weight"),
    NameRow(
        "gated_cross_attention.linear_kv.weight", keys_and_values_by_head, f"{_BLOCK}.cross_attn.{{part}}_proj.weight"
    ),
    NameRow("gated_cross_attention.linear_proj.weight", whole, f"{_BLOCK}.cross_attn.o_proj.weight"),
    NameRow("gated_cross_attention.pre_mlp_layernorm.weight", whole, f"{_BLOCK}.post_attention_layernorm.weight"),
    NameRow("gated_cross_attention.linear_fc1.weight", gate_up, f"{_BLOCK}.mlp.{{part}}_proj.weight"),
    NameRow("gated_cross_attention.linear_fc2.weight", whole, f"{_BLOCK}.mlp.down_proj.weight"),
    NameRow(f"{RESAMPLER}latents", whole, f"{_RESAMPLED}.latents"),
    NameRow(TIME_EMBEDDINGS, whole, f"{_RESAMPLED}.time_embeddings"),
    *_norm(f"{_LAYERS}context_layernorm", f"{_ATTENTION}.context_layer_norm"),
    *_norm(f"{_LAYERS}latents_layernorm", f"{_ATTENTION}.latents_layer_norm"),
    NameRow(f"{_LAYERS}linear_q.weight", whole, f"{_ATTENTION}.q_proj.weight"),
    NameRow(f"{_LAYERS}linear_kv.weight", keys_then_values, f"{_ATTENTION}.{{part}}_proj.weight"),
    NameRow(f"{_LAYERS}linear_proj.weight", whole, f"{_ATTENTION}.output_proj.weight"),
    *_norm(f"{_LAYERS}mlp_layernorm", f"{_MLP}.ln"),
    NameRow(f"{_LAYERS}linear_fc1.weight", whole, f"{_MLP}.fc.weight"),
    NameRow(f"{_LAYERS}linear_fc2.weight", whole, f"{_MLP}.c_proj.weight"),
    *_norm(f"{RESAMPLER}final_layernorm", f"{_RESAMPLED}.layer_norm"),
)
"""`{number}`: of the gated block, or of the resampler's layer. Rows of those layers have no number in our name."""


def config_of(model: ModelConfig) -> VisionConfig:
    assert model.vision is not None
    return model.vision


def vision_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Our name -> shape of every tensor of the vision parts."""
    return {name: shape for name, shape in logical_shapes(model).items() if is_vision(name)}


def vision_links(shapes: dict[str, Shape], model: ModelConfig) -> Iterator[Link]:
    """The link of every tensor with its name in an export, in the order of `shapes` (vision_shapes)."""
    rows = {row.ours: row for row in _ROWS}
    for name, shape in shapes.items():
        number, own_name = _numbered(name, config_of(model).cross_attention_every)
        row = rows[own_name]
        for fields, their_shape, boxes in row.rule(shape, model):
            yield Link(name, row.theirs.format(number=number, **fields), their_shape, boxes)


def _numbered(name: str, every: int) -> tuple[int | None, str]:
    """(number that an export counts it by, name without ours)."""
    if name.startswith(_LAYERS):
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        return int(number), f"{_LAYERS}{rest}"
    layer, rest = split_name(name)
    return (None if layer is None else layer // every), rest
