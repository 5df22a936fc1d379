"""Rules: where the elements of a Hugging Face tensor are in our logical tensor. For both directions. No torch.

    theirs  model.layers.3.self_attn.q_proj.weight  [N*D, H]   elements in C order = the elements of these boxes,
    ours    decoder.layers.3.self_attention.linear_qkv.weight  one after the other

A table of rows (our name, rule, their name) gives links, which work in both directions. An export writes a Hugging Face
tensor from its boxes. An import finds each of our boxes as a contiguous range of a Hugging Face tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from gpt4moe.architecture.names import split_name
from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.cover import cover_problem
from gpt4moe.config.model import ModelConfig
from gpt4moe.errors import ConversionError

Parts = Iterator[tuple[dict[str, object], Shape, list[Box]]]
"""(values for the placeholders of their name, their shape, our boxes)"""
Rule = Callable[[Shape, ModelConfig], Parts]


@dataclass(frozen=True, slots=True)
class NameRow:
    """One row of a table of names."""

    ours: str
    """One of architecture.names."""
    rule: Rule
    theirs: str
    """`{layer}` stands for the number of a layer; the rule fills the other placeholders."""


@dataclass(frozen=True, slots=True)
class Link:
    """A Hugging Face tensor, and our boxes that have its elements, in its C order."""

    ours: str
    theirs: str
    shape: Shape
    boxes: list[Box]


def links(table: tuple[NameRow, ...], shapes: dict[str, Shape], model: ModelConfig) -> Iterator[Link]:
    """The link of every Hugging Face tensor, in the order of `shapes` (our tensors)."""
    rows = {row.ours: row for row in table}
    for name, shape in shapes.items():
        layer, own_name = split_name(name)
        row = rows[own_name]
        for fields, their_shape, boxes in row.rule(shape, model):
            yield Link(name, row.theirs.format(layer=layer, **fields), their_shape, boxes)


def require_whole(all_links: list[Link], shapes: dict[str, Shape]) -> None:
    """Checks before writing: each of our elements is in exactly one target, and no two targets have the same name.

    Raises: ConversionError when the table omits, repeats or adds something.
    """
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    for link in all_links:
        boxes[link.ours] += link.boxes
    problems = [f"{name}: {wrong}" for name in shapes if (wrong := cover_problem(shapes[name], boxes[name]))]
    if len({link.theirs for link in all_links}) < len(all_links):
        problems.append("two tensors would have one name")
    if problems:
        raise ConversionError(problems[0] + ".", "This is a mistake in the program: please report it.")


def whole(shape: Shape, model: ModelConfig) -> Parts:
    """The same tensor."""
    yield {}, shape, [_all_of(shape)]


def qkv(shape: Shape, model: ModelConfig) -> Parts:
    """`{part}` q, k, v. Our rows are, per query group, its query heads, its key, its value."""
    per_group = model.num_attention_heads // model.query_groups
    for part, first, heads in (("q", 0, per_group), ("k", per_group, 1), ("v", per_group + 1, 1)):
        boxes: list[Box] = [
            (((group * (per_group + 2) + first) * model.head_size, 0), (heads * model.head_size, shape[1]))
            for group in range(model.query_groups)
        ]
        yield {"part": part}, (model.query_groups * heads * model.head_size, shape[1]), boxes


def gate_up_of_experts(gate: str, up: str) -> Rule:
    """`{expert}`, `{part}`: two matrices an expert."""

    def rule(shape: Shape, model: ModelConfig) -> Parts:
        for expert in range(shape[0]):
            for index, part in enumerate((gate, up)):
                box = ((expert, index, 0, 0), (1, 1, *shape[2:]))
                yield {"expert": expert, "part": part}, shape[2:], [box]

    return rule


def one_of_experts(shape: Shape, model: ModelConfig) -> Parts:
    """`{expert}`: one matrix an expert."""
    for expert in range(shape[0]):
        yield {"expert": expert}, shape[1:], [((expert, 0, 0), (1, *shape[1:]))]


def fused_gate_up(shape: Shape, model: ModelConfig) -> Parts:
    """[E, 2F, H], as transformers holds it in memory."""
    yield {}, (shape[0], shape[1] * shape[2], shape[3]), [_all_of(shape)]


def gate_up(shape: Shape, model: ModelConfig) -> Parts:
    """`{part}` gate, up of a dense MLP, [2, F, H]."""
    for index, part in enumerate(("gate", "up")):
        yield {"part": part}, shape[1:], [((index, 0, 0), (1, *shape[1:]))]


def copied_gate_up(shape: Shape, model: ModelConfig) -> Parts:
    """`{part}` gate, up of a dense MLP that every expert starts from. Not invertible: boxes repeat the matrix."""
    for index, part in enumerate(("gate", "up")):
        boxes: list[Box] = [((expert, index, 0, 0), (1, 1, *shape[2:])) for expert in range(shape[0])]
        yield {"part": part}, shape[2:], boxes


def copied(shape: Shape, model: ModelConfig) -> Parts:
    """A dense matrix that every expert starts from. Not invertible: boxes repeat the matrix."""
    yield {}, shape[1:], [((expert, *(0,) * (len(shape) - 1)), (1, *shape[1:])) for expert in range(shape[0])]


def is_copy(link: Link) -> bool:
    """Whether the boxes repeat the tensor instead of partitioning it."""
    return sum(prod(box[1]) for box in link.boxes) > prod(link.shape)


def _all_of(shape: Shape) -> Box:
    return (0,) * len(shape), shape
