"""The mixture-of-experts part of a model: its experts, its router, and which layers are MoE. No torch.

ROUTER_TRAITS has a row for each kind of router. docs/extending.md tells how to add one.
"""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config import MISSING
from gpt4moe.errors import ConfigError, check_all


class RouterKind(str, Enum):
    """How a router chooses the experts of a token (docs/moe.md has the equations)."""

    topk = "topk"
    switch = "switch"
    sigmoid_bias = "sigmoid_bias"
    group_limited = "group_limited"


class LoadBalancingScope(str, Enum):
    """The tokens over which the load-balancing loss counts the experts' shares."""

    micro_batch = "micro_batch"
    sequence = "sequence"
    global_batch = "global_batch"


class DropPolicy(str, Enum):
    """By what an expert whose slots are full chooses the tokens that it keeps."""

    probability = "probability"
    position = "position"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterBuffer:
    """State that a router keeps between steps: one fp32 number for each expert, [num_experts], without gradient.

    Every rank has the same values. Checkpoints store them. Only Router.finish_step changes them.
    """

    name: str
    is_share: bool = False
    """The initial value is an even share, 1 / num_experts, instead of 0."""
    steers_routing: bool = False
    """The forward pass reads it, so inference needs it too. False: only the auxiliary loss reads it."""

    def start(self, num_experts: int) -> float:
        """The value before the first step, the same for every expert."""
        return 1 / num_experts if self.is_share else 0.0


LOAD_SHARE = RouterBuffer(name="load_share", is_share=True)
"""Each expert's share of the previous step's tokens; every router has it under load_balancing_scope=global_batch."""
BIAS = RouterBuffer(name="bias", steers_routing=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterTraits:
    """What one kind of router needs. Checks, the table of tensors and tests read these fields, not the kind's name."""

    buffers: tuple[RouterBuffer, ...] = ()
    """Buffers that this kind has. LOAD_SHARE is not among them: load_balancing_scope decides about it."""
    fixed_top_k: int | None = None
    """The only top_k that this kind allows; None: any."""
    is_renormalised: bool = True
    """The weights of a token's experts add up to 1. With top_k=1 the weight is then always 1, so the language model's
    loss gives the router no gradient."""
    is_softmax: bool = False
    """The K largest of the logits' softmax are chosen, so that kernels.router=triton can do it."""
    has_groups: bool = False
    """This kind reads num_groups and group_topk."""


ROUTER_TRAITS: dict[RouterKind, RouterTraits] = {
    RouterKind.topk: RouterTraits(is_softmax=True),
    RouterKind.switch: RouterTraits(fixed_top_k=1, is_renormalised=False, is_softmax=True),
    RouterKind.sigmoid_bias: RouterTraits(buffers=(BIAS,)),
    RouterKind.group_limited: RouterTraits(buffers=(BIAS,), has_groups=True),
}
"""Kind -> its traits. moe/routers/__init__.py has kind -> class."""


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    kind: RouterKind = RouterKind.topk
    """topk: softmax, renormalised over the chosen experts (Mixtral). switch: top-1, weighted by its probability.
    sigmoid_bias: sigmoid scores and a bias that balances the load (DeepSeek-V3). group_limited: as sigmoid_bias, but
    each token chooses among the experts of its best groups only."""
    load_balancing_coefficient: float = 0.01
    """Weight of the load-balancing loss, per MoE layer; 0 turns it off."""
    load_balancing_scope: LoadBalancingScope = LoadBalancingScope.micro_batch
    """micro_batch: shares of one micro-batch. sequence: shares of each sequence; the loss is the mean over sequences.
    global_batch: shares of the whole global batch of the previous step."""
    z_loss_coefficient: float = 0.0
    """Weight of the router z-loss, per MoE layer; 0 turns it off."""
    capacity_factor: float | None = None
    """An expert has ceil(factor * tokens * top_k / num_experts) slots per micro-batch; null: no token is dropped."""
    drop_policy: DropPolicy = DropPolicy.probability
    """Which tokens keep their slots under a capacity. probability: the most probable ones. position: the first ones."""
    input_jitter: float = 0.0
    """Training multiplies the router's input by uniform noise from [1 - jitter, 1 + jitter]; 0: no noise."""
    scaling_factor: float = 1.0
    """Multiplies the chosen experts' weights (DeepSeek-V3: 2.5)."""
    bias_update_rate: float = 0.0
    """sigmoid_bias, group_limited: after each step an expert's bias changes by this much. It goes up if the expert had
    fewer tokens than the mean, else down. DeepSeek-V3: 0.001; 0: the bias stays 0."""
    num_groups: int | None = None
    """group_limited: groups of neighbouring experts, num_experts / num_groups each."""
    group_topk: int | None = None
    """group_limited: groups that a token may use. A group's score is the sum of its two best experts' scores."""

    @property
    def traits(self) -> RouterTraits:
        return ROUTER_TRAITS[self.kind]

    @property
    def is_fusable(self) -> bool:
        """Whether the kernel of kernels.router=triton computes it: its sums are of all tokens together."""
        return self.traits.is_softmax and self.load_balancing_scope is not LoadBalancingScope.sequence

    @property
    def buffers(self) -> tuple[RouterBuffer, ...]:
        """The buffers of a router with these settings."""
        looks_back = self.load_balancing_scope is LoadBalancingScope.global_batch
        return (*((LOAD_SHARE,) if looks_back else ()), *self.traits.buffers)

    def validate(self, top_k: int, num_experts: int) -> None:
        check_all(
            lambda: self._validate_top_k(top_k),
            lambda: self._validate_groups(top_k, num_experts),
            self._validate_numbers,
            self._validate_bias,
        )

    def _validate_numbers(self) -> None:
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(
                f"model.moe.router.capacity_factor={self.capacity_factor} leaves experts without slots.",
                "Set it above 0 (1.25 is usual), or null to drop nothing.",
            )
        for name in ("load_balancing_coefficient", "z_loss_coefficient", "bias_update_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.moe.router.{name}={getattr(self, name)} is negative.", "Set 0 or more.")
        if not 0 <= self.input_jitter < 1:
            raise ConfigError(
                f"model.moe.router.input_jitter={self.input_jitter} is outside [0, 1).", "Set 0.01 (Switch), or 0."
            )
        if self.scaling_factor <= 0:
            raise ConfigError(f"model.moe.router.scaling_factor={self.scaling_factor} is not above 0.", "Set 1.0.")

    def _validate_bias(self) -> None:
        if self.bias_update_rate and BIAS not in self.traits.buffers:
            raise ConfigError(
                f"model.moe.router.bias_update_rate={self.bias_update_rate}, but kind={self.kind.value} has no bias.",
                "Set it to 0, or router@model.moe.router=sigmoid_bias.",
            )

    def _validate_top_k(self, top_k: int) -> None:
        fixed = self.traits.fixed_top_k
        if fixed is not None and top_k != fixed:
            experts = "one expert" if fixed == 1 else f"{fixed} experts"
            raise ConfigError(
                f"model.moe.router.kind={self.kind.value} routes to {experts}, but model.moe.top_k={top_k}.",
                f"Set model.moe.top_k={fixed}, or router@model.moe.router=top2.",
            )
        if self.traits.is_renormalised and top_k == 1:
            raise ConfigError(
                f"model.moe.router.kind={self.kind.value} with model.moe.top_k=1 renormalises every weight to 1.0: the "
                "router would get no gradient from the language model.",
                "Set model.moe.top_k=2 or more, or router@model.moe.router=switch.",
            )

    def _validate_groups(self, top_k: int, num_experts: int) -> None:
        given = (self.num_groups, self.group_topk)
        if not self.traits.has_groups:
            if given != (None, None):
                raise ConfigError(
                    f"model.moe.router.num_groups={self.num_groups} and group_topk={self.group_topk}, but "
                    f"kind={self.kind.value} has no groups.",
                    "Leave both out, or set router@model.moe.router=group_limited.",
                )
            return
        groups, chosen = self.num_groups or 0, self.group_topk or 0
        if groups < 1 or num_experts % groups or num_experts // groups < 2:
            fits = [n for n in range(1, num_experts // 2 + 1) if num_experts % n == 0]
            raise ConfigError(
                f"model.moe.router.num_groups={self.num_groups} does not divide model.moe.num_experts={num_experts} "
                "into groups of two or more: a group is judged by its two best experts.",
                f"Set model.moe.router.num_groups to one of {fits}." if fits else "Set router@model.moe.router=top2.",
            )
        if not 1 <= chosen <= groups or chosen * (num_experts // groups) < top_k:
            raise ConfigError(
                f"model.moe.router.group_topk={self.group_topk} of {groups} groups of {num_experts // groups} experts "
                f"cannot give model.moe.top_k={top_k}.",
                f"Set model.moe.router.group_topk between {-(-top_k * groups // num_experts)} and {groups}.",
            )


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    num_experts: int = MISSING
    """Experts of one MoE layer, over all ranks."""
    ffn_hidden_size: int = MISSING
    """Inner width of one expert (SwiGLU: three matrices of hidden_size x ffn_hidden_size)."""
    top_k: int = 2
    """Experts of a token."""
    shared_expert_ffn_hidden_size: int | None = None
    """Inner width of all shared experts together; null: none. They are one dense SwiGLU that every token passes; its
    output is added to the routed experts' output. n experts of the usual width: n * ffn_hidden_size."""
    layer_pattern: list[int] | None = None
    """For each layer 1 (MoE) or 0 (dense); null: the two keys below decide. By their defaults every layer is MoE."""
    layer_frequency: int = 1
    """Layers whose index is a multiple of this are MoE; 1: all layers."""
    dense_first_layers: int = 0
    """This many layers at the beginning are dense, whatever layer_frequency is (DeepSeek-V3: 3)."""
    router: RouterConfig = field(default_factory=RouterConfig)

    def layers(self, num_layers: int) -> list[bool]:
        """For each layer, whether it is MoE."""
        if self.layer_pattern is not None:
            return [bool(flag) for flag in self.layer_pattern]
        first, frequency = self.dense_first_layers, self.layer_frequency
        return [layer >= first and layer % frequency == 0 for layer in range(num_layers)]

    def validate(self, num_layers: int) -> None:
        for name in ("num_experts", "ffn_hidden_size", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.moe.{name}={getattr(self, name)} is below 1.", f"Set model.moe.{name}.")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"model.moe.top_k={self.top_k} is more than model.moe.num_experts={self.num_experts}.",
                f"Set model.moe.top_k to {self.num_experts} or less.",
            )
        pattern = self.layer_pattern
        if pattern is not None and (len(pattern) != num_layers or set(pattern) - {0, 1} or not any(pattern)):
            raise ConfigError(
                f"model.moe.layer_pattern has {len(pattern)} entries {pattern}; model.num_layers={num_layers}.",
                "Give one 0 (dense) or 1 (MoE) per layer with at least one 1, or null for MoE everywhere.",
            )
        check_all(
            lambda: self._validate_rule(num_layers),
            self._validate_shared_experts,
            lambda: self.router.validate(self.top_k, self.num_experts),
        )

    def _validate_shared_experts(self) -> None:
        shared = self.shared_expert_ffn_hidden_size
        if shared is not None and shared < 1:
            raise ConfigError(
                f"model.moe.shared_expert_ffn_hidden_size={shared} is below 1.",
                f"Set {self.ffn_hidden_size} for one shared expert as wide as a routed one, or null for none.",
            )

    def _validate_rule(self, num_layers: int) -> None:
        frequency, first = self.layer_frequency, self.dense_first_layers
        rule = f"model.moe.layer_frequency={frequency} with model.moe.dense_first_layers={first}"
        if self.layer_pattern is not None and (frequency, first) != (1, 0):
            raise ConfigError(
                f"{rule} and model.moe.layer_pattern={self.layer_pattern} both say which layers are MoE.",
                "Set model.moe.layer_pattern=null, or model.moe.layer_frequency=1 and model.moe.dense_first_layers=0.",
            )
        if frequency < 1 or first < 0 or not any(self.layers(num_layers)):
            raise ConfigError(
                f"{rule} leaves none of model.num_layers={num_layers} layers MoE.",
                "Set model.moe.layer_frequency=1 or more and model.moe.dense_first_layers below the number of layers.",
            )
