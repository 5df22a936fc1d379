"""The SwiGLU experts of one rank: two matrix products around a weighted activation, for each expert's rows.

Shapes: N rows routed here, sorted by expert; H hidden, F ffn, L local experts. Weights as stored: gate and up merged,
gate_up [L, 2F, H], down [L, H, F].

    y = down @ (silu(gate @ x) * (up @ x) * w)          SwiGLU: arXiv:2002.05202, equation 5; w the router's weight

The router's weight multiplies the activation, not the output: down(w * a) = w * down(a), and neither the experts'
outputs nor a [T, K, H] fp32 product need to be kept for the backward pass. The activation is computed again there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from gpt4moe.config.kernels import ExpertKernel, SwiGluKernel, expert_kernel
from gpt4moe.config.optimizer import Dtype
from gpt4moe.errors import ConfigError
from gpt4moe.moe.expert_rows import ExpertRows
from gpt4moe.moe.grouped_products import are_separate, grouped_product
from gpt4moe.moe.per_expert import PerExpert, PerExpertProduct
from gpt4moe.moe.swiglu import ACTIVATIONS, WeightedSwiGlu, weighted_swiglu


def kernel_for(wish: ExpertKernel, device: torch.device, dtype: torch.dtype) -> ExpertKernel:
    """The kernel for weights of this dtype on this device. auto: grouped_mm where torch's is fast, in bf16 on GPUs.

    Raises: ConfigError when this torch does not have that kernel.
    """
    precision = Dtype.bf16 if dtype is torch.bfloat16 else Dtype.fp32
    kernel = expert_kernel(wish, on_gpu=device.type == "cuda", dtype=precision)
    if kernel is ExpertKernel.grouped_mm and not hasattr(torch.nn.functional, "grouped_mm"):
        raise ConfigError(
            f"kernels.experts={wish.value} on {device.type} needs torch.nn.functional.grouped_mm, which torch "
            f"{torch.__version__} does not have.",
            "Install torch 2.10 or newer, or set kernels.experts=per_expert.",
        )
    return kernel


class Experts(nn.Module):
    """Owns gate_up and down of the local experts, and their adapters where there are any (model.adapters).

    Args:
        kernel: grouped_mm or per_expert (see kernel_for).
        etp: the ranks that each hold a part of every expert; None: this one alone.
        swiglu: torch or triton, which is for grouped_mm alone.
    """

    def __init__(
        self, gate_up: nn.Parameter, down: nn.Parameter, kernel: ExpertKernel, etp: ProcessGroup | None = None,
        swiglu: SwiGluKernel = SwiGluKernel.torch,
    ):  # fmt: skip
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = ACTIVATIONS[swiglu]
        self.compute = KERNELS[kernel]
        if swiglu is SwiGluKernel.triton:
            self.compute = partial(self.compute, activation=self.activation)
        self.product = PRODUCTS[kernel]
        self.is_grouped = kernel is ExpertKernel.grouped_mm
        self.etp = etp
        self.adapter_scale = 0.0
        """alpha / rank; 0: there are no adapters."""

    def forward(self, x_NH: Tensor, weight_N1: Tensor, of_experts: ExpertRows) -> Tensor:
        """Expert outputs times the router's weights, [N, H].

        Args:
            x_NH: rows sorted by local expert.
            weight_N1: fp32.
            of_experts: how many rows each local expert has; zero is fine, its gradient is zeros.
        """
        if not self.adapter_scale:
            return self.compute(x_NH, weight_N1, of_experts, self.gate_up, self.down)
        rows = self.product(of_experts)
        hidden = self._adapted("gate_up", x_NH, rows)
        return self._adapted("down", self.activation.apply(hidden, weight_N1), rows)

    def want_aligned(self, num_rows: int) -> bool:
        """Whether a grouped kernel may get so many rows, which are to be those of all local experts."""
        if not self.is_grouped or self.down.shape[0] == 1:
            return False
        # Adapters are small, and gate_up is twice as large as down.
        return bool(self.adapter_scale) or not are_separate(num_rows, self.down.shape, self.down.device)

    def _adapted(self, name: str, x: Tensor, rows: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Rows times the matrix `name`, plus its adapter.

        Under etp, A of gate_up and B of down are whole on every rank, while what meets them is a part of a sum: their
        gradients are summed over etp.
        """
        output = rows(x, getattr(self, name))
        pair = [getattr(self, f"{name}_lora_{part}", None) for part in "ab"]
        if pair[0] is None or pair[1] is None:
            return output
        whole = 0 if name == "gate_up" else 1
        if self.etp is not None and self.etp.size() > 1:
            pair[whole] = SummedGradient.apply(pair[whole], self.etp)
        return output + rows(rows(x, pair[0]), pair[1]) * self.adapter_scale

    def of_few_tokens(self, x_TH: Tensor, expert_index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The outputs of each token's experts, all of which are here, times their weights: [T, K, H]. No gradient.

        For the steps of generation: their time goes into reading the experts that are met, and into small operations.
        """
        expert, top_k = expert_index_TK.flatten(), expert_index_TK.shape[1]
        order = torch.argsort(expert, stable=True)
        rows, weight = x_TH.index_select(0, order // top_k), weight_TK.reshape(-1, 1).index_select(0, order)
        found = Counter(expert.tolist())  # the only wait for a GPU
        met = sorted(found)
        counts = [found[index] for index in met]
        hidden = _products(rows, _some(self.gate_up, met), counts)
        activation = weighted_swiglu(hidden, weight).contiguous()
        out = _products(activation, _some(self.down, met), counts)
        return out.new_empty(out.shape).index_copy_(0, order, out).view(-1, top_k, out.shape[1])


def _some(weights: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The matrices of some experts. A view of each of all takes less time than half as many by their index."""
    if 2 * len(indices) < weights.shape[0]:
        return [weights[index] for index in indices]
    every = weights.unbind()
    return [every[index] for index in indices]


def columns_up_to(weight: Tensor) -> int:
    """Rows whose product with a matrix [out, in] runs as one of columns: on CPUs that takes 10 to 50% less time (fp32,
    MKL, torch 2.13, AVX2), where the matrix is wide for fewer rows."""
    return 8 if weight.shape[0] > weight.shape[1] else 4


def _products(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """x [N, in], `counts` rows for each matrix [out, in] -> [N, out]."""
    # split and not slices: a view by indexing takes as long as a small operation.
    parts = [
        torch.mm(weight, some.t()).t() if count <= columns_up_to(weight) else torch.mm(some, weight.t())
        for weight, some, count in zip(weights, x.split(counts), counts, strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class SummedGradient(torch.autograd.Function):
    """A weight as it is; its gradient is summed over the ranks of a group, which all hold the same weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient[0].contiguous().clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


def _per_expert(x: Tensor, weight: Tensor, rows: ExpertRows, gate_up: Tensor, down: Tensor) -> Tensor:
    return PerExpert.apply(x, weight, rows.listed, gate_up, down)


def _grouped_mm(
    x: Tensor, weight: Tensor, rows: ExpertRows, gate_up: Tensor, down: Tensor, activation: Any = WeightedSwiGlu
) -> Tensor:
    return grouped_product(activation.apply(grouped_product(x, gate_up, rows), weight), down, rows)


# x [N, H], weight [N, 1] fp32, the rows of each expert, gate_up [L, 2F, H], down [L, H, F] -> [N, H]
KERNELS: dict[ExpertKernel, Callable[..., Tensor]] = {
    ExpertKernel.per_expert: _per_expert,
    ExpertKernel.grouped_mm: _grouped_mm,
}


def _per_expert_product(rows: ExpertRows) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: PerExpertProduct.apply(x, weight, rows.listed)


def _grouped_product(rows: ExpertRows) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: grouped_product(x, weight, rows)


# the rows of each expert -> (x [N, in], weight [L, out, in]) -> [N, out]
PRODUCTS: dict[ExpertKernel, Callable[[ExpertRows], Callable[[Tensor, Tensor], Tensor]]] = {
    ExpertKernel.per_expert: _per_expert_product,
    ExpertKernel.grouped_mm: _grouped_product,
}
