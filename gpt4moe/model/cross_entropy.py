"""kernels.cross_entropy=triton: the loss of logits that are cut over tp, in one Triton kernel each way.

    logits [S, B, V/tp] --one read--> log-sum-exp and the label's logit, [2, T] --max, sum over tp--> loss [B, S] fp32
    gradient [S, B, V/tp] = (softmax - one of the label) * the loss's gradient, from the logits, which are kept

Megatron's way takes 25 kernels of torch, passes fp32 copies of the logits some ten times, keeps one of them, and sends
three all-reduces, here two. Its fused one (cross_entropy_loss_fusion) makes every gradient bf16, in fp32 models too.
"""

import importlib
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


class FusedLossModel(GPTModel):  # type: ignore[misc]
    """Megatron's model, whose loss is CrossEntropy."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V/tp] -> each token's loss, [B, S] fp32. Collective over tp."""
        loss: Tensor = CrossEntropy.apply(logits, labels.t().contiguous(), self.pg_collection.tp)
        return loss.t().contiguous()


class CrossEntropy(torch.autograd.Function):
    """logits [..., V/tp] and labels [...] -> losses [...] fp32, equal on every rank of tp."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: ProcessGroup) -> Tensor:
        rows, label, first = logits.flatten(0, -2).contiguous(), labels.flatten(), tp.rank() * logits.shape[-1]
        found = rows.new_empty(2, len(rows), dtype=torch.float32)
        kernels().sums(rows, label, found, first)
        log_sum, picked = found
        if tp.size() > 1:
            most = log_sum.clone()
            distributed.all_reduce(most, distributed.ReduceOp.MAX, group=tp)
            log_sum.sub_(most).exp_()
            distributed.all_reduce(found, group=tp)
            log_sum.log_().add_(most)
        ctx.save_for_backward(rows, label, log_sum)
        ctx.first, ctx.shape = first, logits.shape
        return (log_sum - picked).view_as(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, label, log_sum = ctx.saved_tensors
        grad = torch.empty_like(rows)
        kernels().gradients(gradient[0].flatten().contiguous(), rows, label, log_sum, grad, ctx.first)
        return grad.view(ctx.shape), None, None


def kernels() -> Any:
    """The module of Triton's kernels."""
    return importlib.import_module("gpt4moe.model.cross_entropy_kernels")
