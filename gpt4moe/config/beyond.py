"""The keys beyond.* and stack of a plan: what the planner counts and the trainer cannot build.

A plan that uses any of them says so beside its numbers: in its table, the rows of a search, JSON and pages.
"""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.errors import ConfigError


class Products(str, Enum):
    """What matrix products are multiplied in, above bf16. fp8: one scale for a tensor. mxfp8: one for 32 elements."""

    fp8 = "fp8"
    mxfp8 = "mxfp8"


class Module(str, Enum):
    """A part of a layer whose output the backward pass makes again, by the names of Megatron-core's recompute_modules.

    layernorm: both norms. moe_act: the experts' activation. mla_up_proj: queries, keys and values of latent attention,
    with the rotary embedding. mlp: the MLP of a dense layer. shared_experts: the MLP beside the routed experts.
    """

    layernorm = "layernorm"
    moe_act = "moe_act"
    mla_up_proj = "mla_up_proj"
    mlp = "mlp"
    shared_experts = "shared_experts"


class Dispatch(str, Enum):
    """How rows travel to their experts. plain: a copy for each expert. tuned: a copy for each rank, of those that leave
    an NVLink domain one for each domain (DeepEP, HybridEP). overlapped: tuned, while another micro-batch computes
    (Megatron-core's overlap_moe_expert_parallel_comm)."""

    plain = "plain"
    tuned = "tuned"
    overlapped = "overlapped"


@dataclass(kw_only=True, slots=True)
class BeyondConfig:
    """The keys beyond.*; null: as the trainer has it, or as stack= has it."""

    products: Products | None = None
    """Matrix products in fp8 or mxfp8, beside precision.dtype=bf16; null: in precision.dtype."""
    gradients: Dtype | None = None
    """What gradients are kept and exchanged in; null: fp32."""
    moments: Dtype | None = None
    """What the optimizer's moments are kept in; masters stay fp32. null: fp32."""
    recompute: list[Module] = field(default_factory=list)
    """Modules that are computed again in every layer that parallel.recompute does not repeat whole."""
    dispatch: Dispatch | None = None
    """null: the trainer's, which is plain."""

    def asked(self) -> list[str]:
        """Those keys that are set to what the trainer cannot do, as KEY=VALUE."""
        found = {
            "products": self.products,
            "gradients": self.gradients if self.gradients is not Dtype.fp32 else None,
            "moments": self.moments if self.moments is not Dtype.fp32 else None,
            "dispatch": self.dispatch if self.dispatch is not Dispatch.plain else None,
        }
        texts = [f"beyond.{name}={value.value}" for name, value in found.items() if value is not None]
        modules = ",".join(module.value for module in self.recompute)
        return [*texts, f"beyond.recompute=[{modules}]"] if modules else texts

    def require_used(self, model: ModelConfig, cut: ParallelConfig | None) -> None:
        """Raises: ConfigError for a module or a dispatch that the model has no layer for, or that a layout cannot have.

        Args: cut: the layout; None: a search tries several.
        """
        has_experts, has_dense = any(model.moe_layers), not all(model.moe_layers)
        is_there = {
            Module.layernorm: True,
            Module.moe_act: has_experts,
            Module.mla_up_proj: model.mla is not None,
            Module.mlp: has_dense,
            Module.shared_experts: model.moe is not None and model.moe.shared_expert_ffn_hidden_size is not None,
        }
        for module in self.recompute:
            if not is_there[module] or self.recompute.count(module) > 1:
                why = "is there twice" if is_there[module] else f"has no effect: no layer of {model.name} has it"
                cure = "Name it once." if is_there[module] else f"Leave {module.value} out."
                raise ConfigError(f"beyond.recompute: {module.value} {why}.", cure)
        if self.dispatch is not None and not has_experts:
            raise ConfigError(
                f"beyond.dispatch={self.dispatch.value} has no effect: {model.name} has no experts.",
                "Leave beyond.dispatch out.",
            )
        problem = None if cut is None else self.overlap_problem(cut)
        if problem is not None:
            raise ConfigError(f"beyond.dispatch=overlapped hides nothing: {problem[0]}.", problem[1])

    def overlap_problem(self, cut: ParallelConfig) -> tuple[str, str] | None:
        """Why a layout cannot have dispatch=overlapped, and the cure; None: it can, or it is not asked for."""
        return overlap_problem(cut) if self.dispatch is Dispatch.overlapped else None


def overlap_problem(cut: ParallelConfig) -> tuple[str, str] | None:
    """Why beyond.dispatch=overlapped can hide nothing in this layout, and the cure; None: it can.

    What Megatron-core 0.16.1 refuses (transformer_config.py, overlap_moe_expert_parallel_comm)."""
    if cut.ep == 1:
        return "parallel.ep=1 sends no rows to other ranks", "Set parallel.ep above 1, or leave beyond.dispatch out."
    if cut.pp > 1 and cut.vpp == 1:
        return (
            f"parallel.pp={cut.pp} with vpp=1 has no two micro-batches at once on a rank",
            "Set parallel.vpp above 1 or parallel.pp=1, or beyond.dispatch=tuned.",
        )
    if cut.recompute is Recompute.full:
        return (
            "parallel.recompute=full repeats whole layers, of which no part can wait for rows",
            "Set parallel.recompute=none, beyond.recompute=[layernorm,moe_act] if needed; or beyond.dispatch=tuned.",
        )
    return None
