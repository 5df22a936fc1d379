"""Tiny Hugging Face folders with random weights, as transformers or an older tool would save them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "rope_parameters":
    {"rope_type": "default", "rope_theta": 50000.0},
}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
QWEN3_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 12,
}  # fmt: skip


def save_model(folder: Path, kind: str, shard_size: str = "5GB", **settings: Any) -> Path:
    """A model of `kind` (Mixtral, Qwen3Moe, Llama, Mistral, Qwen3) saved by transformers."""
    run_ranks(1, _save, folder, kind, shard_size, SIZES | settings)
    return folder


def _save(environment: Environment, folder: Path, kind: str, shard_size: str, settings: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm in the wrong place
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)


def fuse(folder: Path) -> None:
    """The expert names of transformers' own modules instead of those on disk."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    is_mixtral = any("block_sparse_moe" in name for name in tensors)
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for layer in range(SIZES["num_hidden_layers"]):  # type: ignore[call-overload]
        new = f"model.layers.{layer}.mlp"
        old = f"model.layers.{layer}.block_sparse_moe" if is_mixtral else new
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
        parts = {
            part: torch.stack([tensors.pop(f"{old}.experts.{expert}.{part}.weight") for expert in range(4)])
            for part in (gate, up, down)
        }
        tensors[f"{new}.experts.gate_up_proj"] = torch.cat([parts[gate], parts[up]], dim=1)
        tensors[f"{new}.experts.down_proj"] = parts[down]
    save_file(tensors, file, metadata={"format": "pt"})
