"""kernels.weight_gradients=fused: products that add a weight's gradient to its fp32 buffer, on CPUs."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.moe import experts, weight_gradients
from gpt4moe.moe.expert_rows import ExpertRows

H, F, COUNTS = 16, 24, [5, 0, 9]
KERNELS = pytest.mark.parametrize("kernel", [ExpertKernel.per_expert, ExpertKernel.grouped_mm])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
DUMMY = 7e9
"""What stands where nobody may read."""


@pytest.fixture(autouse=True)
def memory_has_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the fused path hands to autograd has values that would show."""
    plain = torch.empty
    monkeypatch.setattr(weight_gradients.torch, "empty", lambda *args, **kw: plain(*args, **kw).fill_(DUMMY))


def parameters(dtype: torch.dtype, *, fused: bool, start: float = 0.5) -> list[nn.Parameter]:
    """gate_up and down, with the buffer and the hook that Megatron's DDP gives a parameter."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((len(COUNTS), 2 * F, H), (len(COUNTS), H, F)):
        parameter = nn.Parameter((torch.randn(*shape, generator=generator) / 4).to(dtype))
        parameter.main_grad = torch.full(shape, start)
        parameter.grad_added_to_main_grad, parameter.hooks = False, 0

        def add(parameter: nn.Parameter) -> None:
            parameter.hooks += 1
            assert parameter.grad is not None
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad += parameter.grad
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add)
        if fused:
            weight_gradients.mark(parameter)
        made.append(parameter)
    return made


def passes(made: list[nn.Parameter], kernel: ExpertKernel, *, recompute: bool = False) -> list[Tensor]:
    """Two micro-batches, forward and backward; the gradients of what came in."""
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(1 + seed)
        x = torch.randn(sum(COUNTS), H, generator=generator).to(made[0].dtype).requires_grad_()
        weight = torch.rand(sum(COUNTS), 1, generator=generator).requires_grad_()

        def run(x: Tensor, weight: Tensor) -> Tensor:
            return experts.KERNELS[kernel](x, weight, ExpertRows(torch.tensor(COUNTS)), *made)

        out = checkpoint(run, x, weight, use_reentrant=False) if recompute else run(x, weight)
        out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
        found += [x.grad, weight.grad]
    return found


@DTYPES
@KERNELS
@pytest.mark.parametrize("recompute", [False, True])
def test_the_buffers_get_what_megatrons_hook_would_have_added(
    kernel: ExpertKernel, dtype: torch.dtype, recompute: bool
) -> None:
    plain, fused = parameters(dtype, fused=False), parameters(dtype, fused=True)
    wanted, got = passes(plain, kernel), passes(fused, kernel, recompute=recompute)
    for ours, value in zip(got, wanted, strict=True):
        assert torch.equal(ours, value)
    for ours, value in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours.main_grad, value.main_grad, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.main_grad[1], torch.full_like(ours.main_grad[1], 0.5)), "an expert without rows"
        assert ours.hooks == 2 and ours.grad_added_to_main_grad and not value.grad_added_to_main_grad


@KERNELS
def test_a_frozen_matrix_gets_nothing_and_the_other_all(kernel: ExpertKernel) -> None:
    for frozen in (0, 1):
        plain, fused = parameters(torch.float32, fused=False), parameters(torch.float32, fused=True)
        for made in (plain, fused):
            made[frozen].requires_grad_(False)
            passes(made, kernel)
        assert torch.equal(fused[frozen].main_grad, torch.full_like(fused[frozen].main_grad, 0.5))
        torch.testing.assert_close(fused[1 - frozen].main_grad, plain[1 - frozen].main_grad, rtol=1e-5, atol=1e-5)


@KERNELS
def test_a_product_beside_adapters_adds_too(kernel: ExpertKernel) -> None:
    (plain, _), (fused, _) = parameters(torch.float32, fused=False), parameters(torch.float32, fused=True)
    for weight in (plain, fused):
        x = torch.randn(sum(COUNTS), H, generator=torch.Generator().manual_seed(1)).requires_grad_()
        experts.PRODUCTS[kernel](ExpertRows(torch.tensor(COUNTS)))(x, weight).square().sum().backward()
    torch.testing.assert_close(fused.main_grad, plain.main_grad, rtol=1e-5, atol=1e-5)
    assert fused.hooks == 1 and fused.grad_added_to_main_grad
