"""Forward and backward of one MoE layer on the CPU, as a multiple of its plain matrix products.

    python -m benchmarks.moe_layer              two threads, by the clock
    python -m benchmarks.moe_layer --shared     on a machine that others use: one thread, CPU time
    python -m benchmarks.moe_layer --short      a cell of each kind alone

1.00 is the six products of each expert (gate-up and down: forward, input gradient, weight gradient) on as many rows as
the router sends it, into memory that is there already: nothing else, no autograd. Every contender has the same weights
and its output is checked against ours. Of a peer with two settings the faster one in the cell counts: g for
torch's grouped_mm, l for a loop over experts. Blocks of steps after one that is not counted, in both orders; the best
block of each counts: what else the machine does can only add to a time. gpt4moe is listed twice,
and how far the two are apart is noise. Busiest: the rows of the busiest expert over the mean.
Targets: gpt4moe at most 1.10 in fp32 and 1.25 in bf16, and no peer more than 5% ahead.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.harness.command import read_options
from benchmarks.harness.peers import without_transformer_engine
from benchmarks.harness.process import machine, one_process
from benchmarks.harness.timing import in_blocks
from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.config.moe import MoEConfig, RouterConfig
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.cpu_device import BuildOnCpu
from gpt4moe.parallel.groups import ProcessGroups

HIDDEN = 512
SHAPES = {8: (2, 1408), 16: (2, 1408), 64: (8, 352)}
"""Experts -> top_k, width of an expert."""
TARGETS = {torch.float32: 1.10, torch.bfloat16: 1.25}
AHEAD = 0.95
"""Of our time: a peer that takes less is ahead."""
SAME = {torch.float32: 1e-5, torch.bfloat16: 0.2}
"""How far outputs may be apart, of their norm. In bf16 rounding sends a token in a hundred to another expert."""
ROUNDS, STEPS, THREADS = 6, 2, 2
PLAIN, OURS, AGAIN = "plain products", "gpt4moe", "again"
PEERS = ("Hugging Face", "DeepSpeed", "Megatron")
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is compared in a row."""

    num_experts: int
    tokens: int
    dtype: torch.dtype
    is_even: bool

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
        return f"{self.num_experts:7}{SHAPES[self.num_experts][0]:7}{self.tokens:8}  {name:6}"


CELLS = [Cell(*cell) for cell in product(SHAPES, (512, 2048), TARGETS, (True, False))]
SHORT_CELLS = [Cell(8, 512, torch.float32, True), Cell(64, 512, torch.bfloat16, False)]


def main(arguments: list[str]) -> None:
    given = read_options(
        __doc__, arguments, shared="measure CPU time: others use this machine", short="a cell of each kind alone"
    )
    alone = not given.shared
    logging.getLogger().setLevel(logging.ERROR)
    with one_process(THREADS if alone else 1) as groups:
        print(f"One MoE layer of hidden {HIDDEN}, forward and backward, over its plain matrix products.")
        print(machine() if alone else f"{machine()}, CPU time of one thread")
        print(f"\nexperts  top-k  tokens  dtype busiest {OURS:>8}{AGAIN:>8}{''.join(f'{peer:>14}' for peer in PEERS)}")
        behind = [_compare(groups, cell, alone) for cell in (SHORT_CELLS if given.short else CELLS)]
    for number, name in enumerate(("the multiple of plain products", "no peer more than 5% ahead")):
        missed = sum(row[number] for row in behind)
        print(f"target: {name}: missed in {missed} of {len(behind)} rows" if missed else f"target: {name}: reached")


def _compare(groups: ProcessGroups, cell: Cell, alone: bool) -> tuple[bool, bool]:
    """Prints a row. Whether each target was missed."""
    torch.manual_seed(0)
    ours = _ours(groups, cell)
    layers: dict[str, tuple[nn.Module, Layer]] = {
        OURS: (ours, lambda x: ours(x)[0]),
        "Hugging Face g": _mixtral(ours, "grouped_mm"),
        "Hugging Face l": _mixtral(ours, "eager"),
        "DeepSpeed g": _deepspeed(groups, ours, True),
        "DeepSpeed l": _deepspeed(groups, ours, False),
        "Megatron l": _megatron(groups, ours),
    }
    x, gradient = (torch.randn(cell.tokens // 8, 8, HIDDEN).to(cell.dtype) for _ in range(2))
    x[..., 0] = 1.0  # the router's first weights are then a bias
    x.requires_grad_()
    wanted = ours(x)[0].detach()
    for name, (_, forward) in layers.items():
        distance = float((forward(x).detach() - wanted).float().norm() / wanted.float().norm())
        assert distance < SAME[cell.dtype], f"{name} computes something else: {distance:.1e}"
    chosen = ours.router(x.detach().flatten(0, 1)).expert_index.flatten()
    rows = torch.bincount(chosen, minlength=cell.num_experts).tolist()
    passes = {name: _pass(module, forward, x, gradient) for name, (module, forward) in layers.items()}
    trial = in_blocks({name: run for name, run in passes.items() if name != OURS}, 1, steps=1, alone=alone)
    best = {peer: min((name for name in trial if name.startswith(peer)), key=trial.__getitem__) for peer in PEERS}
    contenders = {PLAIN: _plain_products(ours, rows), OURS: passes[OURS]} | {it: passes[it] for it in best.values()}
    seconds = in_blocks(contenders | {AGAIN: passes[OURS]}, ROUNDS, steps=STEPS, alone=alone)
    found = {name: min(times) / min(seconds[PLAIN]) for name, times in seconds.items()}
    own = found[OURS]
    ahead = [name for name in best.values() if found[name] / own < AHEAD]
    theirs = "".join(f"{found[name]:12.2f} {name[-1]}" for name in best.values())
    remarks = [f"above {TARGETS[cell.dtype]:.2f}"] * (own > TARGETS[cell.dtype]) + [f"{it[:-2]} ahead" for it in ahead]
    busiest = max(rows) * cell.num_experts / sum(rows)
    print(f"{cell}{busiest:7.2f}{own:9.2f}{found[AGAIN]:8.2f}{theirs}  {', '.join(remarks)}".rstrip(), flush=True)
    return own > TARGETS[cell.dtype], bool(ahead)


def _pass(module: nn.Module, forward: Layer, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        forward(x).backward(gradient)

    return run


def _plain_products(ours: ExpertParallelMLP, rows: list[int]) -> Callable[[], None]:
    gate_up, down = ours.experts.gate_up.detach(), ours.experts.down.detach()
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    width, dtype = ours.moe.ffn_hidden_size, gate_up.dtype
    inner = [tuple(torch.randn(n, size).to(dtype) for size in (HIDDEN, 2 * width, width, HIDDEN)) for n in rows]
    outer = [tuple(torch.zeros(n, size, dtype=dtype) for size in (2 * width, HIDDEN, width, HIDDEN)) for n in rows]

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


@torch.no_grad()
def _ours(groups: ProcessGroups, cell: Cell) -> ExpertParallelMLP:
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=cell.dtype, use_cpu_initialization=True)
    router = RouterConfig(load_balancing_coefficient=0.01, z_loss_coefficient=0.001)
    top_k, width = SHAPES[cell.num_experts]
    moe = MoEConfig(num_experts=cell.num_experts, ffn_hidden_size=width, top_k=top_k, router=router)
    layer = ExpertParallelMLP(config, moe, ExpertKernel.auto, groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    # Scaled so that the logits' own spread, 0.45, makes of it about Zipf's law.
    bias = torch.zeros(cell.num_experts) if cell.is_even else -0.35 * torch.arange(1.0, cell.num_experts + 1).log()
    layer.router.weight[:, 0] = bias
    return layer


@torch.no_grad()
def _mixtral(ours: ExpertParallelMLP, implementation: str) -> tuple[nn.Module, Layer]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=ours.moe.ffn_hidden_size, num_local_experts=ours.moe.num_experts,
        num_experts_per_tok=ours.moe.top_k, experts_implementation=implementation,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config).to(ours.experts.down.dtype)
    block.gate.weight.copy_(ours.router.weight)
    block.experts.gate_up_proj.copy_(ours.experts.gate_up)
    block.experts.down_proj.copy_(ours.experts.down)
    return block, block


@torch.no_grad()
def _deepspeed(groups: ProcessGroups, ours: ExpertParallelMLP, use_grouped_mm: bool) -> tuple[nn.Module, Layer]:
    """DeepSpeed's own order of its parts (AutoEPMoELayer) for one rank."""
    from deepspeed.module_inject import auto_ep_layer as parts
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    num_experts, top_k, dtype = ours.moe.num_experts, ours.moe.top_k, ours.experts.down.dtype
    router = TokenChoiceTopKRouter(HIDDEN, num_experts, None, None, top_k, "softmax", True, 1.0, False)
    experts = GroupedExperts(HIDDEN, ours.moe.ffn_hidden_size, num_experts, use_grouped_mm=use_grouped_mm)
    router.to(dtype), experts.to(dtype)
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
            flat[order // top_k], plan.local_counts_by_source
        )
        y = parts.unpermute_by_local_expert(experts(rows, aligned), indices, num_rows)
        return parts.combine_from_routed(y, scores, order, top_k, "post", "weighted_sum", x.shape)

    return nn.ModuleList([router, experts]), forward


@torch.no_grad()
def _megatron(groups: ProcessGroups, ours: ExpertParallelMLP) -> tuple[nn.Module, Layer]:
    """Megatron-core's layer. Its all-gather dispatcher: the all-to-all one needs CUDA streams."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig

    without_transformer_engine()
    num_experts, dtype = ours.moe.num_experts, ours.experts.down.dtype
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, num_moe_experts=num_experts,
        moe_router_topk=ours.moe.top_k, moe_ffn_hidden_size=ours.moe.ffn_hidden_size, params_dtype=dtype,
        moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="aux_loss",
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
