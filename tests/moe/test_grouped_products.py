"""A product for each expert in place of a grouped one: when, and that nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.moe import experts, grouped_products, weight_gradients
from gpt4moe.moe.expert_rows import ALIGNED, ExpertRows, HostCopy, aligned_size

H, F = 16, 24
GPU = torch.device("cuda", 0)
CASES = {
    "several": ([8, 0, 16], 3),
    "padding behind the last": ([8, 8], 8),
    "one": ([5], 0),
    "none": ([0, 0], 0),
}


def passed(counts: list[int], behind: int, *, fused: bool) -> dict[str, Tensor]:
    """Output and gradients of all rows; those behind the last expert's have weight 0."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, sum(counts) + behind, H, generator=generator).unbind()
    weight = torch.rand(len(x), 1, generator=generator)
    weight[sum(counts) :] = 0
    made = []
    for shape in ((len(counts), 2 * F, H), (len(counts), H, F)):
        parameter: Any = nn.Parameter(torch.randn(*shape, generator=generator) / 4)
        parameter.main_grad = torch.ones(shape)
        if fused:
            weight_gradients.mark(parameter)
        made.append(parameter)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    output = experts.KERNELS[ExpertKernel.grouped_mm](*leaves, ExpertRows(torch.tensor(counts)), *made)
    output.backward(gradient)
    grads = [it.main_grad if fused else it.grad for it in made]
    used = sum(counts)
    return dict(zip("owxud", [output.detach()[:used], weight.grad[:used], x.grad[:used], *grads], strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_product_for_each_expert_equals_the_grouped_one(
    case: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_products, "are_separate", lambda *_: False)
    wanted = passed(*CASES[case], fused=fused)
    monkeypatch.setattr(grouped_products, "are_separate", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    got = passed(*CASES[case], fused=fused)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_a_grouped_product_leaves_behind_the_last_expert_reaches_no_gradient(
    case: str, larger: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gate_up is twice as large as down, so one of them may be grouped and the other not."""
    monkeypatch.setattr(grouped_products, "are_separate", lambda *_: False)
    wanted = passed(*CASES[case], fused=fused)
    monkeypatch.setattr(
        grouped_products, "are_separate", lambda rows, shape, device: (shape.numel() > shape[0] * H * F) == larger
    )
    torch.use_deterministic_algorithms(True)  # fills memory without values with NaNs
    try:
        got = passed(*CASES[case], fused=fused)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", ["several", "one"])
def test_a_frozen_matrix_gets_no_gradient_and_its_rows_are_not_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, behind = CASES[case]
    monkeypatch.setattr(grouped_products, "are_separate", lambda *_: True)
    x, weight = torch.randn(sum(counts) + behind, H, requires_grad=True), nn.Parameter(torch.randn(len(counts), F, H))
    of_x = {}
    for frozen in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda it, kept=kept: kept.append(it) or it, lambda it: it):
            out = grouped_products.grouped_product(
                x, weight.requires_grad_(not frozen), ExpertRows(torch.tensor(counts))
            )
        assert any(it is x for it in kept) != frozen
        (of_x[frozen],) = torch.autograd.grad(out[: sum(counts)].square().sum(), x)
    torch.testing.assert_close(of_x[True][: sum(counts)], of_x[False][: sum(counts)])


def test_large_products_are_separate_and_all_where_torchs_grouped_one_is_no_single_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    mixtral, small = torch.Size((8, 4096, 14336)), torch.Size((8, 2048, 768))
    assert grouped_products.are_separate(8 * 1024, mixtral, GPU)
    assert not grouped_products.are_separate(8 * 64, mixtral, GPU)
    assert not grouped_products.are_separate(8 * 1024, small, GPU)
    assert grouped_products.are_separate(1, torch.Size((1, 8, 8)), torch.device("cpu"))
    assert not grouped_products.are_separate(8 * 1024, mixtral, torch.device("cpu"))
    capability = (8, 0)
    assert grouped_products.are_separate(8, small, GPU)


def test_rows_are_aligned_only_for_a_grouped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def want(kernel: ExpertKernel, num_experts: int = 2, adapter_scale: float = 0.0) -> bool:
        made = experts.Experts(
            nn.Parameter(torch.zeros(num_experts, 2 * F, H)), nn.Parameter(torch.zeros(num_experts, H, F)), kernel
        )
        made.adapter_scale = adapter_scale
        return made.want_aligned(100)

    grouped = ExpertKernel.grouped_mm
    assert want(grouped) and not want(grouped, num_experts=1) and not want(ExpertKernel.per_expert)
    monkeypatch.setattr(experts, "are_separate", lambda *_: True)
    assert not want(grouped) and want(grouped, adapter_scale=1.0)


def test_the_host_s_counts_are_those_of_the_device() -> None:
    counts = torch.tensor([0, 1, 8, 9])
    assert [aligned_size(count) for count in counts.tolist()] == [8, 8, 8, 16]
    assert all(aligned_size(count) % ALIGNED == 0 for count in range(40))
    rows = ExpertRows(lambda: counts)
    assert rows.listed == HostCopy(counts).listed == [0, 1, 8, 9] and rows.ends.tolist() == [0, 1, 9, 18]
