"""The experts' kernels against plain products under autograd."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.errors import ConfigError
from gpt4moe.moe import experts, per_expert
from gpt4moe.moe.expert_rows import ExpertRows
from gpt4moe.moe.swiglu import WeightedSwiGlu

H, F = 16, 24
KERNELS = pytest.mark.parametrize("kernel", [ExpertKernel.per_expert, ExpertKernel.grouped_mm])
COUNTS = {"even": [6, 6, 6], "uneven": [1, 11, 5], "a starved expert": [7, 0, 9], "no rows at all": [0, 0, 0]}
Named = dict[str, Tensor]


def _inputs(counts: list[int], dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, num_experts = sum(counts), len(counts)
    return {
        "x": draw(rows, H).to(dtype),
        "weight": draw(rows, 1).sigmoid(),
        "gate_up": (draw(num_experts, 2 * F, H) / H**0.5).to(dtype),
        "down": (draw(num_experts, H, F) / F**0.5).to(dtype),
        "gradient": draw(rows, H).to(dtype),
    }


def _with_gradients(inputs: Named, run) -> Named:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items() if name != "gradient"}
    output = run(leaves)
    output.backward(inputs["gradient"])
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def _plain(counts: list[int]):
    """Mixtral's formula: weight applied to the expert's output."""

    def run(leaves: Named) -> Tensor:
        rows = zip(leaves["x"].split(counts), leaves["weight"].split(counts), strict=True)
        parts = []
        for expert, (x, weight) in enumerate(rows):
            gate, up = (x @ leaves["gate_up"][expert].t()).chunk(2, dim=-1)
            parts.append(weight * ((nn.functional.silu(gate) * up) @ leaves["down"][expert].t()))
        return torch.cat(parts)

    return run


def _ours(counts: list[int], kernel: ExpertKernel):
    def run(leaves: Named) -> Tensor:
        function = experts.KERNELS[kernel]
        return function(
            leaves["x"], leaves["weight"], ExpertRows(torch.tensor(counts)), leaves["gate_up"], leaves["down"]
        )

    return run


@KERNELS
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_kernel_equals_plain_products_in_value_and_every_gradient(kernel: ExpertKernel, counts: list[int]) -> None:
    inputs = _inputs(counts)
    wanted, got = _with_gradients(inputs, _plain(counts)), _with_gradients(inputs, _ours(counts, kernel))
    for name, value in wanted.items():
        # fp32, products of at most 48 terms in another order.
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@KERNELS
def test_an_expert_without_rows_gets_a_gradient_of_zeros(kernel: ExpertKernel) -> None:
    counts = COUNTS["a starved expert"]
    got = _with_gradients(_inputs(counts), _ours(counts, kernel))
    assert not got["gate_up"][1].any() and not got["down"][1].any()
    assert got["gate_up"][0].any() and got["down"][2].any()


def test_per_expert_and_grouped_mm_agree_in_bf16_within_its_rounding() -> None:
    counts = COUNTS["uneven"]
    inputs = _inputs(counts, torch.bfloat16)
    one, other = (_with_gradients(inputs, _ours(counts, kernel)) for kernel in ExpertKernel if kernel.value != "auto")
    for name, value in one.items():
        distance = (value.float() - other[name].float()).norm() / value.float().norm()
        assert distance < 2**-8, name  # half a unit in the last place of bf16, relative


def test_the_weighted_activation_equals_autograds() -> None:
    hidden, weight = torch.randn(9, 2 * F), torch.rand(9, 1)
    gradient = torch.randn(9, F)

    def by_autograd(hidden: Tensor, weight: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up * weight

    found = []
    for function in (WeightedSwiGlu.apply, by_autograd):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        output = function(*leaves)
        output.backward(gradient)
        found.append((output.detach(), leaves[0].grad, leaves[1].grad))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_weighted_activation_of_bf16_is_computed_in_fp32() -> None:
    hidden, weight = torch.randn(9, 2 * F).bfloat16(), torch.rand(9, 1)
    in_fp32 = WeightedSwiGlu.apply(hidden.float(), weight)
    assert torch.equal(WeightedSwiGlu.apply(hidden, weight), in_fp32.bfloat16())


def test_a_torch_without_grouped_mm_is_refused_where_the_kernel_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")  # public since 2.10
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    for wish, device in ((ExpertKernel.auto, gpu), (ExpertKernel.grouped_mm, cpu)):
        with pytest.raises(ConfigError, match=f"kernels.experts={wish.value} on {device.type}") as refused:
            experts.kernel_for(wish, device, torch.bfloat16)
        assert torch.__version__ in refused.value.cause
        assert "2.10" in refused.value.cure and "kernels.experts=per_expert" in refused.value.cure
    for wish, device in ((ExpertKernel.auto, cpu), (ExpertKernel.per_expert, gpu)):
        assert experts.kernel_for(wish, device, torch.bfloat16) is ExpertKernel.per_expert


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_few_tokens_get_what_the_kernel_gives_their_rows(num_tokens: int) -> None:
    """One row of an expert, a few as columns, more as columns and as rows, many as rows; fp32 in another order."""
    inputs, top_k = _inputs([num_tokens, 0, 0, 0]), 2
    of = experts.Experts(
        nn.Parameter(inputs["gate_up"]), nn.Parameter(inputs["down"]), kernel=ExpertKernel.per_expert
    )  # fmt: skip
    score = torch.rand(num_tokens, 3, generator=torch.Generator().manual_seed(1))  # nobody chooses the last expert
    weight, index = score.topk(top_k, dim=-1)
    with torch.no_grad():
        found = of.of_few_tokens(inputs["x"], index, weight)
        for token, slot in product(range(num_tokens), range(top_k)):
            counts = nn.functional.one_hot(index[token, slot], 4)
            wanted = of(inputs["x"][token : token + 1], weight[token, slot].view(1, 1), ExpertRows(counts))
            torch.testing.assert_close(found[token, slot], wanted[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 12])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_chunks_of_experts_change_nothing(counts: list[int], rows_a_chunk: int, monkeypatch) -> None:
    inputs = _inputs(counts)
    whole = _with_gradients(inputs, _ours(counts, ExpertKernel.per_expert))
    monkeypatch.setattr(per_expert, "CHUNK_BYTES", rows_a_chunk * 4 * 2 * F)
    for name, value in _with_gradients(inputs, _ours(counts, ExpertKernel.per_expert)).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-6)


def test_a_chunk_is_as_many_experts_as_fit_and_at_least_one(monkeypatch) -> None:
    monkeypatch.setattr(per_expert, "CHUNK_BYTES", 10 * 4 * 8)
    found = per_expert.chunks_of([4, 6, 0, 1, 30, 2], width=8)
    assert [chunk.counts for chunk in found] == [[4, 6, 0], [1], [30], [2]]
    assert [chunk.experts for chunk in found] == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)]
    assert [chunk.rows for chunk in found] == [slice(0, 10), slice(10, 11), slice(11, 41), slice(41, 43)]


def test_experts_of_few_rows_share_their_small_operations() -> None:
    """Every expert needs 2 products on the way there and 4 back; the activation is computed once each way."""
    counts = [4] * 16
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _with_gradients(_inputs(counts), _ours(counts, ExpertKernel.per_expert))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == 6 * len(counts)
    assert (calls["aten::silu"], calls["aten::silu_backward"]) == (2, 1)
