"""kernels.router=triton: what is around the kernel, and the kernel's formulas, against the plain router; and the kernel
in Triton's interpreter and compiled for GPUs."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from gpt4moe.config.kernels import FusedKernel
from gpt4moe.config.load import load_run_config
from gpt4moe.config.moe import LoadBalancingScope, MoEConfig, RouterConfig, RouterKind
from gpt4moe.moe.losses import auxiliary_losses, load_of
from gpt4moe.moe.routers import ROUTERS, build_router, softmax_choice
from gpt4moe.moe.routers.base import Router
from gpt4moe.moe.routers.topk import TopK
from gpt4moe.moe.statistics import COLUMNS, RoutedBatch
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.activations import layer_bytes
from gpt4moe.planner.micro_batch import MicroBatch
from tests.model.plain_kernels import RouterKernels
from tests.moe.test_swiglu_kernels import printed

H, E = 12, 6
IDS = {"all real": None, "padding": torch.tensor([0, 5, -1, 3, 4, -1, 9])}


class OnePool:
    """TokenPool of one rank."""

    size = 1

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        return values


def routed(router: Router, settings: RouterConfig, x: Tensor, token_id: Tensor | None) -> dict[str, Tensor]:
    """Choice, losses, statistics and the gradient of the matrix."""
    routing = router(x, token_id)
    real = None if token_id is None else token_id >= 0
    load = load_of(routing, real, E)
    losses = auxiliary_losses(
        routing, real, load=load, settings=settings, load_share=router.load_share, pool=OnePool(), batch=1
    )  # fmt: skip
    (routing.weight.square().sum() + 0.7 * (losses[0] + losses[1])).backward()
    batch = RoutedBatch(routing=routing, load=load[0], keep=None, real_T=real, losses=losses, pool_size=1)
    measured = {name: value.detach() for name, of in COLUMNS.items() if (value := of.measure(batch)) is not None}
    return measured | {
        "index": routing.expert_index, "weight": routing.weight.detach(), "margin of tokens": routing.margin,
        "probability": routing.probability.detach(), "load": load, "gradient": router.weight.grad,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_id", IDS.values(), ids=IDS)
@pytest.mark.parametrize(("kind", "top_k"), [("topk", 2), ("topk", E), ("switch", 1)])
def test_one_choice_with_sums_equals_the_plain_router_its_losses_and_statistics(
    kind: str, top_k: int, token_id: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bf16 model tokens and matrix are bf16, and all between them is fp32: only the gradient is rounded."""
    monkeypatch.setattr(softmax_choice, "kernels", lambda: RouterKernels)
    settings = RouterConfig(
        kind=RouterKind(kind), z_loss_coefficient=0.3, load_balancing_coefficient=0.5, scaling_factor=1.5
    )
    moe = MoEConfig(num_experts=E, ffn_hidden_size=8, top_k=top_k, router=settings)
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(rows, H, generator=generator).to(dtype) for rows in (7, E))
    wanted, got = (
        routed(build_router(nn.Parameter(matrix.clone()), moe, fused=fused), settings, x, token_id)
        for fused in (False, True)
    )
    assert wanted.keys() == got.keys() and got["gradient"].abs().sum() > 0
    for name, value in wanted.items():
        close = {"rtol": 2**-7, "atol": 2**-7} if value.dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got[name], value, **close, check_dtype=name != "margin", msg=name)


class Own(TopK):
    """Somebody's rule in the place of top-k."""


def test_only_our_routers_of_a_softmax_without_sequences_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for kind, scope in (("topk", "micro_batch"), ("topk", "sequence"), ("sigmoid_bias", "micro_batch")):
        settings = RouterConfig(kind=RouterKind(kind), load_balancing_scope=LoadBalancingScope(scope))
        moe = MoEConfig(num_experts=E, ffn_hidden_size=8, top_k=2, router=settings)
        router = build_router(nn.Parameter(torch.zeros(E, H)), moe, fused=True)
        found[kind, scope] = router.choose_fused is not None
    assert list(found.values()) == [True, False, False]
    monkeypatch.setitem(ROUTERS, RouterKind.topk, Own)
    moe = MoEConfig(num_experts=E, ffn_hidden_size=8, top_k=2)
    assert build_router(nn.Parameter(torch.zeros(E, H)), moe, fused=True).choose_fused is None
    assert FusedKernel.auto.is_triton(on_gpu=True) and not FusedKernel.auto.is_triton(on_gpu=False)


def test_a_plan_counts_probabilities_that_are_kept_once() -> None:
    def of(*more: str) -> MicroBatch:
        run = load_run_config(["+experiment=mixtral_slice", "run.name=test", *more])
        return MicroBatch.of(run, Layout.from_config(run.parallel, 1), 1.0)

    assert layer_bytes(of("kernels.router=torch"), 0) - layer_bytes(of(), 0) == 4 * 4096 * (8 + 1)
    for other in ("cluster=cpu", "router@model.moe.router=sigmoid_bias"):
        assert not of(other).fused_router


VALUES = """
import torch
from gpt4moe.moe.routers import softmax_choice, softmax_kernels as ours
from tests.model.plain_kernels import RouterKernels


def results_of(kernels, logits, ids, given, renormalised):
    (tokens, experts), top_k = logits.shape, given[0].shape[1]
    probability, index = torch.empty_like(logits), torch.full((tokens, top_k), -1)
    log_sum, margin, weight = torch.empty(tokens), torch.empty(tokens), torch.empty(tokens, top_k)
    blocks = torch.empty(softmax_choice.num_blocks(tokens, experts), 2 * experts + softmax_choice.SCALARS)
    kernels.choose(logits, ids, probability, log_sum, index, weight, margin, blocks, renormalised)
    grad = torch.full_like(logits, 7.0)
    kernels.choice_gradients(probability, log_sum, index, weight, ids, *given, grad, renormalised)
    return [probability, log_sum, index, weight, margin, blocks.sum(dim=0), grad]


def compare(logits, top_k, renormalised, masked, elements):
    softmax_choice.ELEMENTS = elements
    tokens, experts = logits.shape
    ids = torch.arange(tokens) - 2 if masked else None
    given = torch.randn(tokens, top_k), torch.randn(experts), torch.randn(())
    results = [results_of(kernels, logits, ids, given, renormalised) for kernels in (ours, RouterKernels)]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5, equal_nan=True)
    chosen = results[0][2]
    assert ((chosen >= 0) & (chosen < experts)).all()
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert twice"
    real = chosen if ids is None else chosen[ids >= 0]
    assert results[0][5][experts : 2 * experts].equal(torch.bincount(real.flatten(), minlength=experts).float())
    return results[0]


for tokens, experts, top_k, renormalised, masked in (
    (11, 8, 2, True, False), (9, 6, 1, False, True), (5, 5, 5, True, True), (7, 16, 3, True, True),
    (0, 8, 2, True, False), (3, 1, 1, True, False), (4, 60, 8, True, True), (4, 100, 6, True, False),
):
    logits = 3 * torch.randn(tokens, experts)
    compare(logits, top_k, renormalised, masked, 32)  # several blocks, the last one not full
    compare(logits, top_k, renormalised, masked, 1024)
    # As a router of a bf16 model has them: equal logits. The first of equals is chosen.
    compare(logits.round(), top_k, renormalised, masked, 32)
assert compare(torch.zeros(3, 6), 2, True, False, 32)[2].tolist() == 3 * [[0, 1]]
# All of the probability at one expert, and one that no token may have.
compare(torch.tensor([[200.0, 0, 0, -200], [0, 1, 2, -torch.inf]]), 2, True, False, 32)
# Whatever the numbers are, different experts are chosen and counted, and the NaN shows in weights and sums.
broken = torch.randn(6, 6)
broken[1], broken[2, 4], broken[3, 0], broken[4] = torch.nan, torch.nan, torch.inf, -torch.inf
for renormalised in (True, False):
    found = compare(broken, 2, renormalised, False, 32)
    assert found[3].isnan().all(dim=1).tolist() == found[6].isnan().all(dim=1).tolist() == [False, *4 * [True], False]
    assert found[5][[0, -4, -3]].isnan().all() and found[5][-2:].isfinite().all()
print("equal")
"""
COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpt4moe.moe.routers import softmax_kernels as ours
from gpt4moe.moe.routers.softmax_choice import columns_of_block, tokens_of_block

types = {"token_id": "*i64", "index": "*i64", "tokens": "i32", "experts": "i32"}
for experts, top_k, renormalised, masked in ((8, 2, True, False), (60, 1, False, True), (256, 8, True, True)):
    for kernel in (ours._choose, ours._gradients):
        constants = {"TOP_K": top_k, "RENORMALISED": renormalised, "MASKED": masked}
        constants |= {"ROWS": tokens_of_block(experts), "COLUMNS": columns_of_block(experts)}
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
        for capability in (80, 90):
            made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
            assert len(made.asm["cubin"]) > 1000
print("compiled")
"""
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton: make test-triton")


@NO_TRITON
def test_the_kernels_equal_torchs_operations_in_value_and_gradient() -> None:
    assert printed(VALUES, TRITON_INTERPRET="1") == "equal"


@NO_TRITON
def test_the_kernels_compile_for_gpus() -> None:
    assert printed(COMPILES) == "compiled"
