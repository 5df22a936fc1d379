"""The table of optimizers: which tensors each keeps for a parameter, and which engines can run it. No torch.

    OptimizerKind -> OPTIMIZERS -> engines (what to build and shard), checkpoints (state tensors of a weight),
                                   planner (bytes), replica check, proof, rehearsal

To add an optimizer, add a member of OptimizerKind and a row here. A proof compares layouts under AdamW alone
(proof.replay).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt4moe.config.optimizer import EngineKind, OptimizerConfig, OptimizerKind
from gpt4moe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """One row of the table."""

    states: tuple[str, ...]
    """State tensors with one fp32 value for each element of a parameter, by torch's names. They are zero before the
    first update. A checkpoint stores each as STATE/PARAMETER."""
    step_name: str | None = "step"
    """The state tensor that counts updates; None: the class keeps none. A checkpoint stores the count once, as
    manifest.optimizer_step. Engines refuse a class that keeps any other state (training.engine.check_states)."""
    is_elementwise: bool = True
    """The update of an element reads no other element, so a rank may own any flat range of a parameter. Both engines
    need this. No engine here can run an optimizer that needs whole matrices (Muon) or norms of tensors (LAMB)."""
    engines: Mapping[EngineKind, str]
    """Engine -> its name for the optimizer. megatron: a value of Megatron's OptimizerConfig.optimizer. deepspeed: a
    class of torch.optim."""
    arguments: Callable[[OptimizerConfig], dict[str, Any]]
    """Further arguments of torch's class, beside parameters, learning rate and weight decay."""


OPTIMIZERS: dict[OptimizerKind, Optimizer] = {
    # Loshchilov and Hutter, arXiv:1711.05101. Megatron-core 0.16.1 shards no other optimizer than Adam.
    OptimizerKind.adamw: Optimizer(
        states=("exp_avg", "exp_avg_sq"),
        engines={EngineKind.megatron: "adam", EngineKind.deepspeed: "AdamW"},
        arguments=lambda given: {"betas": (given.beta1, given.beta2), "eps": given.epsilon, "fused": True},
    ),
}


def optimizer_for(kind: OptimizerKind, engine: EngineKind) -> Optimizer:
    """The row of an optimizer.

    Raises: ConfigError when the table has no such optimizer, or `engine` cannot run it.
    """
    row = OPTIMIZERS.get(kind)
    if row is not None and row.is_elementwise and engine in row.engines:
        return row
    runs = [known.value for known, its in OPTIMIZERS.items() if engine in its.engines and its.is_elementwise]
    others = [other.value for other in row.engines if row.is_elementwise] if row else []
    raise ConfigError(
        f"optimizer.kind={kind.value} with engine.kind={engine.value}, which runs {', '.join(runs)} only.",
        f"Set optimizer.kind={runs[0]}" + (f", or engine={others[0]}." if others else "."),
    )
