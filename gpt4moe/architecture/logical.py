"""The logical tensors of a model and their shapes, from its configuration alone. No torch."""

from gpt4moe.config.model import ModelConfig

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""(offset, shape) of a rectangle of a logical tensor."""


def logical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name -> global shape of every weight, in model order (model.parameters names them)."""
    hidden = model.hidden_size
    qkv_rows = (model.num_attention_heads + 2 * model.query_groups) * model.head_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (model.vocab_size, hidden)}
    for layer, is_moe in enumerate(model.moe_layers):
        of_layer: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "self_attention.linear_qkv.weight": (qkv_rows, hidden),
            "self_attention.linear_proj.weight": (hidden, model.num_attention_heads * model.head_size),
            **(_head_norms(model) if model.qk_norm else {}),
            "pre_mlp_layernorm.weight": (hidden,),
            **(_mixture(model) if is_moe else _dense(model)),
        }
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not model.tied_embeddings:
        shapes["output_layer.weight"] = (model.vocab_size, hidden)
    return shapes


def logical_buffers(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of the state that no gradient moves (model.parameters.buffers).

    A router's bias, and the load of the step before where the load-balancing loss looks at it.
    """
    if model.moe is None:
        return {}
    return {
        f"decoder.layers.{layer}.mlp.router.{buffer.name}": (model.moe.num_experts,)
        for layer, is_moe in enumerate(model.moe_layers)
        for buffer in model.moe.router.buffers
        if is_moe
    }


def routing_buffers(model: ModelConfig) -> dict[str, Shape]:
    """The buffers that inference needs: the forward pass reads them (config.moe.RouterBuffer)."""
    if model.moe is None:
        return {}
    needed = {buffer.name for buffer in model.moe.router.buffers if buffer.steers_routing}
    return {name: shape for name, shape in logical_buffers(model).items() if name.rpartition(".")[2] in needed}


def _head_norms(model: ModelConfig) -> dict[str, Shape]:
    return {f"self_attention.{part}_layernorm.weight": (model.head_size,) for part in "qk"}


def _mixture(model: ModelConfig) -> dict[str, Shape]:
    assert model.moe is not None
    experts, hidden, ffn = model.moe.num_experts, model.hidden_size, model.moe.ffn_hidden_size
    shared = model.moe.shared_expert_ffn_hidden_size
    of_shared: dict[str, Shape] = {
        "mlp.shared_experts.linear_fc1.weight": (2, shared or 0, hidden),
        "mlp.shared_experts.linear_fc2.weight": (hidden, shared or 0),
    }
    return {
        **(of_shared if shared else {}),
        "mlp.router.weight": (experts, hidden),
        "mlp.experts.gate_up": (experts, 2, ffn, hidden),
        "mlp.experts.down": (experts, hidden, ffn),
    }


def _dense(model: ModelConfig) -> dict[str, Shape]:
    assert model.ffn_hidden_size is not None  # ModelConfig.validate
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return {"mlp.linear_fc1.weight": (2, ffn, hidden), "mlp.linear_fc2.weight": (hidden, ffn)}
