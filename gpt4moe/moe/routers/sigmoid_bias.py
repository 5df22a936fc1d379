"""Sigmoid scores, and a bias that balances the load without a loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    s = sigmoid(logits);  chosen = K largest s + b;  weight_k = s_k / (sum of the chosen s)             (13-16)
    after each step       b += rate * sign(mean load - load)                                            (2408.15664)

The bias only chooses. The weight comes from s, so the language model's gradient does not feel the balancing.
"""

import torch
from torch import Tensor, nn

from gpt4moe.config.moe import MoEConfig
from gpt4moe.moe.routers.base import Choice, Router, best

# As DeepSeek's and Megatron's: keeps a row of vanished scores from dividing by 0.
_TINY = 1e-20


class SigmoidBias(Router):
    bias: Tensor
    """[E] fp32; config.moe.BIAS declares it."""

    def __init__(self, weight: nn.Parameter, moe: MoEConfig):
        super().__init__(weight, moe)
        self.bias_update_rate = moe.router.bias_update_rate

    def choose(self, logits: Tensor) -> Choice:
        score = torch.sigmoid(logits)
        candidates, near = self.candidates(score.detach() + self.bias)
        expert_index, margin = best(candidates, self.top_k)
        chosen = score.gather(1, expert_index)
        weight = chosen / (chosen.sum(dim=-1, keepdim=True) + _TINY)
        probability = score / (score.sum(dim=-1, keepdim=True) + _TINY)
        preferred_index, _ = best(score, self.top_k)
        return Choice(probability, expert_index, weight, preferred_index, margin.minimum(near))

    def candidates(self, biased: Tensor) -> tuple[Tensor, Tensor]:
        """Biased scores [T, E], -inf for experts that a token may not choose; and [T], the score gap to the best group
        that was left out (infinite: none was)."""
        return biased, biased.new_full(biased.shape[:1], torch.inf)

    @torch.no_grad()
    def finish_step(self, load_E: Tensor) -> None:
        super().finish_step(load_E)
        # fp64 counts are exact, so no layout's rounding turns a sign.
        direction = torch.sign(load_E.sum() - load_E * load_E.numel())
        self.bias.add_(direction.to(self.bias.dtype), alpha=self.bias_update_rate)
