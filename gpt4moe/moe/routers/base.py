"""Router: one matrix, fp32 arithmetic, and what every kind of router shares.

    x [T, H] --noise (training)--> --matrix--> logits [T, E] --choose (the kind)--> Choice --scaling--> Routing

Shapes: T tokens of this rank, H hidden, E experts of the layer over all ranks, K experts a token goes to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.config.moe import LOAD_SHARE, MoEConfig
from gpt4moe.parallel.rng import counter_uniform


@dataclass(frozen=True, slots=True)
class Choice:
    """What a kind of router makes of the logits."""

    probability: Tensor
    """[T, E] fp32, sums to 1 over the experts; the gradient of the auxiliary losses flows through it."""
    expert_index: Tensor
    """[T, K] int64."""
    weight: Tensor
    """[T, K] fp32, before scaling; the language model's gradient reaches the router through it."""
    preferred_index: Tensor
    """[T, K] int64, the K best experts by score alone, without bias or group: the load-balancing loss counts these."""
    margin: Tensor
    """[T] fp32, score gap between the last chosen expert and the best rejected one (or between the last chosen group
    and the best rejected group, if that is smaller); 0 where no expert was rejected."""


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over the real tokens of one rank, fp32, which a kernel makes with the choice."""

    probability: Tensor
    """[E], with gradient."""
    z: Tensor
    """Of logsumexp(logits)^2, with gradient."""
    load: Tensor
    """[E], assignments of each expert, before any drop."""
    entropy: Tensor
    margin: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Routing(Choice):
    """Where the tokens of one rank go. `weight` is scaled: it is what an expert's output is multiplied by."""

    logits: Tensor
    """[T, E] fp32."""
    sums: TokenSums | None = None
    """None: whoever wants a sum makes it of the fields above. Else `probability` has no gradient."""


class Router(nn.Module):
    """Owns the routing matrix [E, H] and the fp32 buffers that config.moe declares for these settings.

    The matrix is stored in the model's dtype and multiplied in fp32. A buffer is state that no gradient moves: the same
    on every rank of a pipeline stage, part of checkpoints, changed by finish_step alone.
    """

    load_share: Tensor | None
    """Share of the step before that each expert got, [E]; None where the load-balancing loss does not use it."""

    def __init__(self, weight: nn.Parameter, moe: MoEConfig):
        super().__init__()
        settings = moe.router
        self.weight = weight
        self.top_k = moe.top_k
        self.scaling_factor = settings.scaling_factor
        self.input_jitter = settings.input_jitter
        self.choose_fused: Callable[[Tensor, Tensor | None], tuple[Choice, TokenSums]] | None = None
        """In place of `choose`, where a kernel makes sums too."""
        self.noise_key = 0
        """Stands for (seed, layer); training.step sets it."""
        self.register_buffer(LOAD_SHARE.name, None)
        for buffer in settings.buffers:
            start = torch.full((moe.num_experts,), buffer.start(moe.num_experts), device=weight.device)
            self.register_buffer(buffer.name, start)

    def forward(self, x_TH: Tensor, token_id_T: Tensor | None = None) -> Routing:
        """Args:
        token_id_T: int64, which token of the run each row is, below 0 padding; needed with input_jitter in training.
        """
        x = x_TH.float()
        if self.input_jitter and self.training:
            assert token_id_T is not None, "input_jitter without token numbers"
            x = x * self._noise(token_id_T, x.shape[1])
        logits = torch.nn.functional.linear(x, self.weight.float())
        choice, sums = self.choose_fused(logits, token_id_T) if self.choose_fused else (self.choose(logits), None)
        weight = choice.weight if self.scaling_factor == 1 else choice.weight * self.scaling_factor
        return Routing(
            choice.probability, choice.expert_index, weight, choice.preferred_index, choice.margin, logits, sums
        )  # fmt: skip

    def choose(self, logits: Tensor) -> Choice:
        """The kind's rule for logits [T, E] fp32."""
        raise NotImplementedError

    @torch.no_grad()
    def finish_step(self, load_E: Tensor) -> None:
        """Moves the buffers, after an optimizer step.

        Args:
            load_E: assignments of each expert over the whole global batch, the same on every rank.
        """
        if self.load_share is not None and load_E.sum() > 0:
            self.load_share.copy_(load_E / load_E.sum())

    def _noise(self, token_id_T: Tensor, width: int) -> Tensor:
        """Uniform in [1 - jitter, 1 + jitter], [T, H], by (seed, layer, token of the run, column): equal on every
        layout. Switch Transformer, arXiv:2101.03961, section 2.4."""
        column = torch.arange(width, device=token_id_T.device)
        uniform = counter_uniform(self.noise_key, token_id_T.unsqueeze(1) * width + column)
        return 1 + self.input_jitter * (2 * uniform - 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts change the weight's dtype and no buffer's: a bias that moves by 0.001 a step would stand still in
        bf16."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self.weight.device)
        return self


def best(score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest scores of each row, and the gap between the last of them and the next one.

    Args:
        score: [T, E]; -inf: not a candidate.
    Returns: index [T, K], margin [T], 0 where no candidate was left.
    """
    value, index = torch.topk(score.detach(), min(top_k + 1, score.shape[1]), dim=-1)
    margin = value[:, top_k - 1] - value[:, -1]  # 0 where all experts are chosen
    return index[:, :top_k].contiguous(), margin.nan_to_num(0.0, 0.0, 0.0)
