"""The mixture-of-experts part of a model: experts, which layers have them, and their router. No torch.

ROUTER_TRAITS is the table of what each kind of router needs; docs/moe.md, "Adding a router", has the recipe.
"""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config.missing import MISSING
from gpt4moe.errors import ConfigError, check_all


class RouterKind(str, Enum):
    """How tokens choose experts (docs/moe.md has the equations)."""

    topk = "topk"
    switch = "switch"
    sigmoid_bias = "sigmoid_bias"
    group_limited = "group_limited"


class LoadBalancingScope(str, Enum):
    """Over which tokens the load-balancing loss takes its shares."""

    micro_batch = "micro_batch"
    sequence = "sequence"
    global_batch = "global_batch"


class DropPolicy(str, Enum):
    """Which tokens an over-full expert lets go."""

    probability = "probability"
    position = "position"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterBuffer:
    """One fp32 number for each expert, [num_experts], that a router keeps between steps and no gradient moves.

    Every rank has the same values. They are part of checkpoints; only Router.finish_step changes them.
    """

    name: str
    is_share: bool = False
    """Starts as an even share, 1 / num_experts, instead of 0."""
    steers_routing: bool = False
    """The forward pass reads it, so that inference needs it too; else only the auxiliary loss does."""

    def start(self, num_experts: int) -> float:
        """Its value before the first step, the same for every expert."""
        return 1 / num_experts if self.is_share else 0.0


LOAD_SHARE = RouterBuffer(name="load_share", is_share=True)
"""Share of the step before that each expert got; of every kind, under LoadBalancingScope.global_batch."""
BIAS = RouterBuffer(name="bias", steers_routing=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterTraits:
    """What one kind of router needs. The checks below, the table of tensors and the random layouts of the tests ask
    this, not the kind's name."""

    buffers: tuple[RouterBuffer, ...] = ()
    """Of this kind alone; LOAD_SHARE comes from a setting."""
    fixed_top_k: int | None = None
    """The only top_k that it can have; None: any."""
    is_renormalised: bool = True
    """The weights of a token's experts add up to 1. With top_k=1 the weight is then always 1, and the language model's
    loss does not reach the router."""
    has_groups: bool = False
    """It reads num_groups and group_topk."""


ROUTER_TRAITS: dict[RouterKind, RouterTraits] = {
    RouterKind.topk: RouterTraits(),
    RouterKind.switch: RouterTraits(fixed_top_k=1, is_renormalised=False),
    RouterKind.sigmoid_bias: RouterTraits(buffers=(BIAS,)),
    RouterKind.group_limited: RouterTraits(buffers=(BIAS,), has_groups=True),
}
"""Kind -> what it needs. moe/routers/__init__.py has kind -> its class."""


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    kind: RouterKind = RouterKind.topk
    """topk: softmax, renormalised over the chosen (Mixtral). switch: top-1, weighted by the raw probability.
    sigmoid_bias: sigmoid scores, a bias that balances the load (DeepSeek-V3). group_limited: the same, choosing only
    among the experts of a token's best groups."""
    load_balancing_coefficient: float = 0.01
    """Weight of the load-balancing loss, per MoE layer; 0 turns it off."""
    load_balancing_scope: LoadBalancingScope = LoadBalancingScope.micro_batch
    """Shares of one micro-batch, of each sequence (the loss is their mean), or of the whole global batch of the step
    before."""
    z_loss_coefficient: float = 0.0
    """Weight of the router z-loss, per MoE layer; 0 turns it off."""
    capacity_factor: float | None = None
    """Slots of an expert = ceil(factor * tokens * top_k / num_experts) per micro-batch; null: no token is dropped."""
    drop_policy: DropPolicy = DropPolicy.probability
    """With a capacity: keep the most probable tokens, or the earliest."""
    input_jitter: float = 0.0
    """In training the router's input is multiplied by uniform noise from [1 - jitter, 1 + jitter]; 0: none."""
    scaling_factor: float = 1.0
    """Multiplies the chosen experts' weights (DeepSeek-V3: 2.5)."""
    bias_update_rate: float = 0.0
    """sigmoid_bias, group_limited: how far an expert's bias moves after each step, up when it got less than the mean
    (DeepSeek-V3: 0.001); 0: it stays 0."""
    num_groups: int | None = None
    """group_limited: groups of neighbouring experts, num_experts / num_groups each."""
    group_topk: int | None = None
    """group_limited: groups a token chooses from, by the sum of their two best scores."""

    @property
    def traits(self) -> RouterTraits:
        return ROUTER_TRAITS[self.kind]

    @property
    def buffers(self) -> tuple[RouterBuffer, ...]:
        """What a router with these settings keeps between steps."""
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
    """Experts a token goes to."""
    shared_expert_ffn_hidden_size: int | None = None
    """Inner width of the shared experts together: a dense SwiGLU that every token goes through, added to the routed
    experts' output (n shared experts as wide as a routed one: n * ffn_hidden_size); null: none."""
    layer_pattern: list[int] | None = None
    """One 1 (MoE) or 0 (dense) per layer; null: by the two keys below, which leave every layer MoE."""
    layer_frequency: int = 1
    """Of layers 0, 1, 2, ... those whose number divides by this are MoE; 1: all."""
    dense_first_layers: int = 0
    """The first layers of the model that are dense, whatever layer_frequency says (DeepSeek-V3: 3)."""
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
