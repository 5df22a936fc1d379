"""The cases that the GPU rehearsal's tests share. No torch, so that it can be read before the guard is loaded.

LAYOUTS of tests.distributed x both engines     one layer a stage; the stage differs between the engines
CASES                                           what else a run may choose, on one process or two
GENERATION                                      a model without an engine, as tools/generate.py has it
"""

from gpt4moe.config.optimizer import EngineKind
from tests.distributed.layouts import LAYOUTS, LayoutCase

BASE = (
    "+experiment=tiny", "data=mock", "cluster=h200_141g", "model.num_layers=1", "model.hidden_size=64",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=64", "model.vocab_size=128",
    "model.moe.num_experts=8", "model.moe.ffn_hidden_size=96", "model.moe.router.capacity_factor=null",
    "training.global_batch_size=4", "training.micro_batch_size=2", "precision=bf16",
)  # fmt: skip
TWO_LAYERS, EP2, ROUTER = "model.num_layers=2", "parallel.ep=2", "model.moe.router"
LAST_STAGE = {"pp2": 1, "pp4": 2, "pp2-vpp2": 1, "pp4-vpp2": 3, "pp2-dp2-ep2": 2}
"""Layout -> the rank that Megatron's engine has (of pp4 a middle stage). All others have rank 0."""


def _degree(case: LayoutCase, name: str) -> int:
    return next((int(o.partition("=")[2]) for o in case.overrides if o.startswith(f"parallel.{name}=")), 1)


def _layout(name: str, engine: EngineKind) -> tuple[str, ...]:
    case = LAYOUTS[name]
    tp, pp, vpp, cp = (_degree(case, axis) for axis in ("tp", "pp", "vpp", "cp"))
    dp = case.world_size // (tp * pp * cp)
    micro_batches = pp if vpp > 1 else min(pp, 2)
    rank = LAST_STAGE.get(name, 0) if engine is EngineKind.megatron else 0
    return (
        *case.overrides, f"model.num_layers={pp * vpp}", "training.micro_batch_size=1", f"engine={engine.value}",
        f"training.global_batch_size={dp * micro_batches}", f"ranks={case.world_size}", f"rank={rank}",
    )  # fmt: skip


CASES = {
    "one process": (TWO_LAYERS,),
    "one layer": ("training.micro_batch_size=4",),
    "large products of experts": (
        "model.hidden_size=4096", "model.head_dim=16", "model.moe.ffn_hidden_size=14336",
        "training.micro_batch_size=64", "training.global_batch_size=64",
    ),
    "weight gradients by autograd": ("training.micro_batch_size=4", "kernels.weight_gradients=torch"),
    "fp32, per_expert": ("precision=fp32", TWO_LAYERS),
    "fp32, tp2 cp2 ep2": ("precision=fp32", "parallel.tp=2", "parallel.cp=2", EP2),
    "tp2 ep2": (TWO_LAYERS, "parallel.tp=2", EP2),
    "per_expert in bf16": (EP2, "kernels.experts=per_expert"),
    "grouped_mm on an A100": (EP2, "cluster=a100_80g"),
    "top_k=3, wide heads, qk_norm": (EP2, "model.moe.top_k=3", "model.head_dim=128", "model.qk_norm=true"),
    "tied embeddings, first stage": ("parallel.pp=2", TWO_LAYERS, "model.tied_embeddings=true"),
    "tied embeddings, last stage": ("parallel.pp=2", TWO_LAYERS, "model.tied_embeddings=true", "rank=1"),
    "dense": ("model.moe=null", "model.ffn_hidden_size=96", "parallel.tp=2"),
    "dense first layer": (TWO_LAYERS, EP2, "model.moe.dense_first_layers=1", "model.ffn_hidden_size=96"),
    "deepspeed, offload": (EP2, "engine=deepspeed", "engine.offload_optimizer=true"),
    "recompute=selective, cp2": ("parallel.cp=2", "parallel.recompute=selective"),
    "recompute=moe": (EP2, "parallel.recompute=moe"),
    "recompute=full": (EP2, "parallel.recompute=full"),
    "recompute=full of one layer": (TWO_LAYERS, EP2, "parallel.recompute=full", "parallel.recompute_layers=1"),
    "switch: noise, drops by position": (
        EP2, f"router@{ROUTER}=switch", "model.moe.top_k=1", f"{ROUTER}.capacity_factor=1.25",
    ),
    "topk: drops by probability": (EP2, f"{ROUTER}.capacity_factor=1.25"),
    "topk: noise, tp2 pp2, last stage": (
        TWO_LAYERS, "parallel.tp=2", "parallel.pp=2", EP2, f"{ROUTER}.input_jitter=0.1", "rank=2",
    ),
    "topk: balanced per sequence": ("parallel.tp=2", "parallel.cp=2", f"{ROUTER}.load_balancing_scope=sequence"),
    "topk: balanced per global batch": (EP2, f"{ROUTER}.load_balancing_scope=global_batch"),
    "sigmoid_bias with shared experts": (
        EP2, f"router@{ROUTER}=sigmoid_bias", "model.moe.shared_expert_ffn_hidden_size=48",
    ),
    "group_limited, everything recomputed": (
        EP2, f"router@{ROUTER}=group_limited", "parallel.recompute=full", f"{ROUTER}.input_jitter=0.1",
    ),
    "documents": (TWO_LAYERS, "data.document_mask=true"),
    "documents, cp2, selective": ("data.document_mask=true", "parallel.cp=2", "parallel.recompute=selective"),
    "deterministic": (TWO_LAYERS, "parallel.tp=2", EP2, "training.deterministic=true"),
    "deterministic, drops, deepspeed": (
        EP2, f"{ROUTER}.capacity_factor=1.25", "engine=deepspeed", "training.deterministic=true",
    ),
    "vision": ("stage=vision", "+vision@model.vision=tiny", TWO_LAYERS, "model.vision.cross_attention_every=2"),
    "vision, tp2 pp2, all trained": (
        "stage=vision", "+vision@model.vision=tiny", "stage.train=[]", TWO_LAYERS, "parallel.tp=2", "parallel.pp=2",
        EP2,
    ),
    "adapters": ("parallel.tp=2", EP2, "stage.lora.rank=8"),
    "padding": (EP2, "model.moe.shared_expert_ffn_hidden_size=48"),
    "padding, drops, experts recomputed": (
        "parallel.tp=2", "parallel.cp=2", EP2, f"{ROUTER}.capacity_factor=1.25", "parallel.recompute=moe",
    ),
    **{f"{name}, {engine.value}": _layout(name, engine) for name in LAYOUTS for engine in EngineKind},
}  # fmt: skip
GENERATION = {
    "generation": (TWO_LAYERS, "model.qk_norm=true"),
    "generation in fp32": (f"router@{ROUTER}=sigmoid_bias", "precision=fp32"),
    "generation, group_limited": (f"router@{ROUTER}=group_limited", "model.tied_embeddings=true"),
}
FAULTS = (
    "item in a layer", "tensor on the CPU", "offsets of a wrong dtype", "mask in attention", "large copy",
    "norm on the CPU, generating", "floats added up, deterministic", "counts awaited at once",
    "counts never awaited, large", "event before the copy, large",
)  # fmt: skip
"""Planted one at a time by `tests.gpu_rehearsal.faults`."""


CUDA_BUILD = "a CUDA build of torch: the GPU rehearsal refuses it, and needs the CPU build"
"""Why its tests are skipped."""


def overrides(case: str) -> list[str]:
    """What the tool would be given for a case. Routers set their own capacity, so BASE's comes after them."""
    fault = ("training.deterministic=true",) if case.endswith("deterministic") else ("training.micro_batch_size=4",)
    if case.endswith("large"):  # the host then reads how many rows each expert has
        fault = CASES["large products of experts"]
    extra = {**CASES, **GENERATION}.get(case, fault)
    return [*(o for o in extra if o.startswith("router@")), *BASE, *(o for o in extra if not o.startswith("router@"))]
