"""Bytes that one operation reads and writes on a GPU, its FLOPs, and the part of the step that it belongs to.

An operation whose inputs and outputs are all read or written once needs no row here. The tables hold the others.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout

NO_KERNEL = frozenset((
    "view", "slice", "select", "detach", "transpose", "t", "_unsafe_view", "expand", "unsqueeze", "permute",
    "split", "split_with_sizes", "alias", "as_strided", "squeeze", "unbind", "chunk", "reshape", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device", "lift_fresh", "set_",
    "unsafe_split", "narrow", "view_as", "_reshape_alias", "is_pinned", "resize_", "diagonal",
))  # fmt: skip
"""Names of aten operations that launch nothing: they make views, or memory without values."""
_FILLS = frozenset((
    "zeros", "ones", "full", "fill_", "zero_", "new_zeros", "zeros_like", "ones_like", "full_like", "arange",
    "new_full",
))  # fmt: skip


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def size_bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads of it: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def memory_bytes(name: str, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation moves.

    Args:
        name: without namespace and overload: "mm".
        args: as the operation got them; `inputs`: their tensors.
    """
    if name in _BYTES:
        return _BYTES[name](args, inputs, outputs)
    if name in _FILLS:
        return sum(map(size_bytes, outputs[:1]))
    known = {id(tensor) for tensor in inputs}
    return sum(map(size_bytes, inputs)) + sum(size_bytes(out) for out in outputs if id(out) not in known)


def _in_place(args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return 2 * size_bytes(inputs[0]) + sum(map(size_bytes, inputs[1:]))


def _picked(args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Only the rows that are picked are read."""
    return 2 * size_bytes(outputs[0]) + sum(size_bytes(t) for t in inputs[1:] if not t.is_floating_point())


_BYTES: dict[str, Callable[[Sequence[Any], list[Tensor], list[Tensor]], int]] = {
    "copy_": lambda args, inputs, outputs: size_bytes(inputs[0]) + size_bytes(inputs[1]),
    **dict.fromkeys(("add_", "mul_", "sub_", "div_"), _in_place),
    **dict.fromkeys(("index_select", "index", "embedding"), _picked),
    "index_put_": lambda args, inputs, outputs: 2 * size_bytes(inputs[-1]) + sum(map(size_bytes, inputs[1:-1])),
    **dict.fromkeys(("scatter_add_", "scatter_"), lambda args, inputs, outputs: 3 * size_bytes(inputs[-1])),
    # All but the gradients, the second argument, are written too.
    "_fused_adamw_": lambda args, inputs, outputs: (
        2 * sum(map(size_bytes, inputs)) - sum(map(size_bytes, tensors(args[1])))
    ),
}


def flops(name: str, inputs: list[Tensor]) -> float:
    """FLOPs of a matrix product or of attention; 0 for all others, which memory bounds."""
    if name in ("mm", "bmm", "_grouped_mm", "addmm"):
        left, right = inputs[1:3] if name == "addmm" else inputs[:2]
        return 2.0 * left.numel() * right.shape[-1]
    if name == "_scaled_dot_product_flash_attention":
        return 2 * _causal_products(inputs[0], inputs[1])
    if name == "_scaled_dot_product_flash_attention_backward":
        return 5 * _causal_products(inputs[1], inputs[2])
    if name == "_flash_attention_forward":
        return 2 * _document_products(inputs[0], inputs[1], inputs[3])
    if name == "_flash_attention_backward":
        return 5 * _document_products(inputs[1], inputs[2], inputs[6])
    return 0.0


def _document_products(query: Tensor, key: Tensor, offsets: Tensor) -> float:
    """FLOPs of one product of queries [T, N, D] with keys [K, G, D] in documents of equal length."""
    tokens, heads, size = query.shape
    num_queries, num_keys = (len(x) / (len(offsets) - 1) for x in (query, key))
    return 2.0 * heads * size * tokens * (num_keys - num_queries / 2)


def _causal_products(query: Tensor, key: Tensor) -> float:
    """FLOPs of one product of queries [B, N, S, D] with keys, where the last query sees every key."""
    batch, heads, num_queries, size = query.shape
    return 2.0 * batch * heads * size * num_queries * (key.shape[2] - num_queries / 2)


_OF_EXPERTS = ("per_expert.py", "grouped_products.py")
_PARTS = (
    ("swiglu", "SwiGLU"), ("WeightedSwiGlu", "SwiGLU"), *((file, "expert products") for file in _OF_EXPERTS),
    ("cross_entropy", "cross-entropy"), ("rope_utils", "rotary embedding"), ("rotary", "rotary embedding"),
    ("routers", "router"), ("topk.py", "router"), ("switch.py", "router"), ("sigmoid_bias.py", "router"),
    ("losses.py", "router losses and statistics"), ("statistics.py", "router losses and statistics"),
    ("pool.py", "router losses and statistics"), ("_gathered", "router losses and statistics"),
    ("auto_ep_layer", "permutation"), ("dispatch.py", "permutation"),
    ("clip_gradients", "gradient norm and clip"), ("gradient_norm", "gradient norm and clip"),
    ("zero_grad", "zeroing gradients"), ("optimizer", "optimizer"),
    ("hook", "gradient accumulation"),
    ("attention.py:_attend", "attention"), ("_scaled_loss", "loss"), ("batch.py", "batch to the GPU"),
)  # fmt: skip
"""(part of the names of the innermost functions, part of the step); the first that fits."""


def part_of(name: str, functions: str, shapes: list[tuple[int, ...]], run: RunConfig, layout: Layout) -> str:
    """The part of the step that an operation belongs to: by its functions, and in the backward pass, which has none, by
    its shapes.

    Args:
        functions: the innermost ones (places.functions).
    """
    if "flash" in name:
        return "attention"
    if name == "_grouped_mm":
        return "expert products"
    if name in ("mm", "bmm", "addmm") and not any(file in functions for file in _OF_EXPERTS):
        return "dense products"
    for word, part in _PARTS:
        if word in functions:
            return part
    model = run.model
    sizes = {size for shape in shapes for size in shape}
    last = {shape[-1] for shape in shapes if shape}
    if model.vocab_size // layout.tp in sizes:
        return "cross-entropy"
    if model.moe and {model.moe.ffn_hidden_size // layout.etp, 2 * model.moe.ffn_hidden_size // layout.etp} & sizes:
        return "experts, element-wise"
    if model.moe and model.moe.num_experts in last:
        return "router"
    if {model.head_size, model.head_size // 2} & last:
        return "attention, element-wise"
    return "residual stream and norms" if model.hidden_size in last else "small operations"
