"""What the tensors of a model are called, without their layer. No torch.

    decoder.layers.3.self_attention.linear_qkv.weight  =  layer 3, QKV

Every other place uses these constants, so that a name is written once. The table (table.py) has a row for each.
"""

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
INPUT_NORM = "input_layernorm.weight"
QKV = "self_attention.linear_qkv.weight"
Q_NORM = "self_attention.q_layernorm.weight"
K_NORM = "self_attention.k_layernorm.weight"
ATTENTION_OUT = "self_attention.linear_proj.weight"
MLP_NORM = "pre_mlp_layernorm.weight"
DENSE_GATE_UP = "mlp.linear_fc1.weight"
DENSE_DOWN = "mlp.linear_fc2.weight"
ROUTER = "mlp.router.weight"
EXPERTS_GATE_UP = "mlp.experts.gate_up"
EXPERTS_DOWN = "mlp.experts.down"
SHARED_GATE_UP = "mlp.shared_experts.linear_fc1.weight"
SHARED_DOWN = "mlp.shared_experts.linear_fc2.weight"
ROUTER_MODULE = "mlp.router"
"""What the names of a router's buffers begin with."""
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT_LAYER = "output_layer.weight"

_LAYERS = "decoder.layers."


def adapter_names(name: str) -> tuple[str, str]:
    """The names of the two matrices A and B of a matrix's adapter: linear_qkv.lora_a, experts.gate_up_lora_a."""
    stem = f"{name.removesuffix('weight')}" if name.endswith(".weight") else f"{name}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def layer_name(layer: int, name: str) -> str:
    """The name of a layer's tensor in the whole model.

    Args:
        layer: its global index, from 0.
        name: one of the constants above.
    """
    return f"{_LAYERS}{layer}.{name}"


def split_name(name: str) -> tuple[int | None, str]:
    """(layer, name within it) of a tensor of the whole model; (None, name) of one outside the decoder's layers."""
    if not name.startswith(_LAYERS):
        return None, name
    layer, _, rest = name.removeprefix(_LAYERS).partition(".")
    return int(layer), rest
