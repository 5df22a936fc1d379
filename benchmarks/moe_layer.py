"""Forward and backward of one MoE layer, fp32 on the CPU, as a multiple of its plain matrix products.

    python -m benchmarks.moe_layer              two threads, by the clock
    python -m benchmarks.moe_layer --shared     on a machine that others use: one thread, CPU time

1.00 is the six products of each expert (gate-up and down: forward, input gradient, weight gradient) on as many rows as
the router sends it, into memory that is there already: nothing else, no autograd. Every contender has the same weights
and its output is checked against ours. Target: gpt4moe at most 1.20 for 8 and 16 experts.
"""

import logging
import sys
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine, one_process
from benchmarks.harness.timing import interleaved, ratio
from gpt4moe.config.moe import MoEConfig, RouterConfig
from gpt4moe.config.training import ExpertKernel
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.cpu_device import BuildOnCpu
from gpt4moe.parallel.groups import ProcessGroups

TOKENS, HIDDEN, FFN, TOP_K = 2048, 512, 1408, 2
EXPERTS = (8, 16)
ROUNDS, THREADS = 9, 2
TARGET = 1.20
Layer = Callable[[Tensor], Tensor]


def main(arguments: list[str]) -> None:
    alone = not read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    logging.getLogger().setLevel(logging.ERROR)
    with one_process(THREADS if alone else 1) as groups:
        print(f"One MoE layer, forward and backward: {TOKENS} tokens, hidden {HIDDEN}, ffn {FFN}, top-{TOP_K}, fp32.")
        print(machine() if alone else f"{machine()}, CPU time of one thread")
        for num_experts in EXPERTS:
            _compare(groups, num_experts, alone)


def _compare(groups: ProcessGroups, num_experts: int, alone: bool) -> None:
    torch.manual_seed(0)
    ours = _ours(groups, num_experts)
    layers: dict[str, tuple[nn.Module, Layer]] = {
        "gpt4moe": (ours, lambda x: ours(x)[0]),
        "Mixtral block, grouped_mm": _mixtral(ours, "grouped_mm"),
        "Mixtral block, eager": _mixtral(ours, "eager"),
        "DeepSpeed expert-parallel parts, loop": _deepspeed(groups, ours),
        "Megatron MoELayer, sequential": _megatron(groups, ours),
    }
    x, gradient = torch.randn(TOKENS // 8, 8, HIDDEN, requires_grad=True), torch.randn(TOKENS // 8, 8, HIDDEN)
    wanted = ours(x)[0].detach()
    for name, (_, forward) in layers.items():
        distance = float((forward(x).detach() - wanted).norm() / wanted.norm())
        assert distance < 1e-5, f"{name} computes something else: {distance:.1e}"
    rows = torch.bincount(ours.router(x.detach().flatten(0, 1)).expert_index.flatten(), minlength=num_experts)
    contenders = {"plain products": _plain_products(ours, rows.tolist())}
    contenders |= {name: _pass(module, forward, x, gradient) for name, (module, forward) in layers.items()}
    seconds = interleaved(contenders, ROUNDS, alone=alone)
    print(f"\n{num_experts} experts {'':26}ratio   median ms")
    for name, times in seconds.items():
        print(f"  {name:38}{ratio(times, seconds['plain products']):5.2f}   {1e3 * median(times):9.1f}")
    found = ratio(seconds["gpt4moe"], seconds["plain products"])
    print(f"  target: gpt4moe at most {TARGET:.2f}: {'reached' if found <= TARGET else 'NOT reached'}")


def _pass(module: nn.Module, forward: Layer, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        forward(x).backward(gradient)

    return run


def _plain_products(ours: ExpertParallelMLP, rows: list[int]) -> Callable[[], None]:
    gate_up, down = ours.experts.gate_up.detach(), ours.experts.down.detach()
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    inner = [tuple(torch.randn(n, width) for width in (HIDDEN, 2 * FFN, FFN, HIDDEN)) for n in rows]
    outer = [tuple(torch.zeros(n, width) for width in (2 * FFN, HIDDEN, FFN, HIDDEN)) for n in rows]

    def run() -> None:
        for e, ((x, grad_hidden, activation, grad), (hidden, y, grad_activation, grad_x)) in enumerate(
            zip(inner, outer, strict=True)
        ):
            torch.mm(x, gate_up[e].t(), out=hidden)
            torch.mm(activation, down[e].t(), out=y)
            torch.mm(grad, down[e], out=grad_activation)
            torch.mm(grad.t(), activation, out=grad_down[e])
            torch.mm(grad_hidden, gate_up[e], out=grad_x)
            torch.mm(grad_hidden.t(), x, out=grad_gate_up[e])

    return run


def _ours(groups: ProcessGroups, num_experts: int) -> ExpertParallelMLP:
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=torch.float32, use_cpu_initialization=True)
    router = RouterConfig(load_balancing_coefficient=0.01, z_loss_coefficient=0.001)
    moe = MoEConfig(num_experts=num_experts, ffn_hidden_size=FFN, top_k=TOP_K, router=router)
    layer = ExpertParallelMLP(config, moe, ExpertKernel.auto, groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


@torch.no_grad()
def _mixtral(ours: ExpertParallelMLP, implementation: str) -> tuple[nn.Module, Layer]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=ours.moe.num_experts,
        num_experts_per_tok=TOP_K, experts_implementation=implementation,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(ours.router.weight)
    block.experts.gate_up_proj.copy_(ours.experts.gate_up)
    block.experts.down_proj.copy_(ours.experts.down)
    return block, block


@torch.no_grad()
def _deepspeed(groups: ProcessGroups, ours: ExpertParallelMLP) -> tuple[nn.Module, Layer]:
    """DeepSpeed's own order of its parts (AutoEPMoELayer) for one rank."""
    from deepspeed.module_inject import auto_ep_layer as parts
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    num_experts = ours.moe.num_experts
    router = TokenChoiceTopKRouter(HIDDEN, num_experts, None, None, TOP_K, "softmax", True, 1.0, False)
    experts = GroupedExperts(HIDDEN, FFN, num_experts, use_grouped_mm=False)
    router.gate.weight.copy_(ours.router.weight)
    gate, up = ours.experts.gate_up.chunk(2, dim=1)
    for theirs, values in ((experts.w1, gate), (experts.w3, up), (experts.w2, ours.experts.down)):
        theirs.copy_(values)

    def forward(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        scores, chosen, counts = router(flat)
        order = torch.argsort(chosen.flatten(), stable=True)
        plan = parts.compute_split_plan(chosen, num_experts, 1, num_experts, groups.ep, counts)
        rows, indices, aligned, num_rows = parts.permute_by_local_expert(
            flat[order // TOP_K], plan.local_counts_by_source
        )
        y = parts.unpermute_by_local_expert(experts(rows, aligned), indices, num_rows)
        return parts.combine_from_routed(y, scores, order, TOP_K, "post", "weighted_sum", x.shape)

    return nn.ModuleList([router, experts]), forward


@torch.no_grad()
def _megatron(groups: ProcessGroups, ours: ExpertParallelMLP) -> tuple[nn.Module, Layer]:
    """Megatron-core's layer. Its all-gather dispatcher: the all-to-all one needs CUDA streams."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine megatron-core 0.16.1 reads this name although it never imported it; 0.19.2 sets it so.
    moe_utils.te_general_gemm = None
    num_experts = ours.moe.num_experts
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, num_moe_experts=num_experts, moe_router_topk=TOP_K,
        moe_ffn_hidden_size=FFN, moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01, moe_router_dtype="fp32", gated_linear_unit=True,
        activation_func=nn.functional.silu, add_bias_linear=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    with BuildOnCpu():
        spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
        layer = spec(config=config, pg_collection=groups.megatron)
    layer.set_layer_number(1)
    layer.router.weight.copy_(ours.router.weight)
    for expert, gate_up, down in zip(layer.experts.local_experts, ours.experts.gate_up, ours.experts.down, strict=True):
        expert.linear_fc1.weight.copy_(gate_up)
        expert.linear_fc2.weight.copy_(down)
    return layer, lambda x: layer(x)[0]


if __name__ == "__main__":
    main(sys.argv[1:])
