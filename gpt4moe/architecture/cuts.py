"""The table of parameters: how ranks cut each, and how it starts. No torch, so that conversions read it too.

Names are those of a chunk or of the whole model: their endings are the same (parameters.py says how they differ).
"""

from dataclasses import dataclass
from enum import Enum


class Cut(Enum):
    """How ranks divide a parameter."""

    whole = "every rank holds all of it"
    rows = "dim 0 over tp"
    columns = "dim 1 over tp"
    gated_rows = "[2F, H]: the same rows of gate and up over tp"
    experts_gated = "[L, 2F, H]: experts over ep, the same rows of gate and up over etp"
    experts = "[L, H, F]: experts over ep, columns over etp"


class Start(Enum):
    """The initial value."""

    ones = "1"
    normal = "normal, init_std"
    residual = "normal, init_std / sqrt(2 * num_layers): it adds to the residual stream"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table: parameters whose name ends with `suffix`."""

    suffix: str
    cut: Cut
    start: Start


RULES = (
    Rule("embedding.word_embeddings.weight", Cut.rows, Start.normal),
    # Of layers, of the whole, and q_layernorm and k_layernorm [D], which every head of a layer shares.
    Rule("layernorm.weight", Cut.whole, Start.ones),
    # Rows are, per query group, its query heads, then its key, then its value: a plain cut over tp.
    Rule("self_attention.linear_qkv.weight", Cut.rows, Start.normal),
    Rule("self_attention.linear_proj.weight", Cut.columns, Start.residual),
    Rule("mlp.linear_fc1.weight", Cut.gated_rows, Start.normal),
    Rule("mlp.linear_fc2.weight", Cut.columns, Start.residual),
    Rule("mlp.shared_experts.linear_fc1.weight", Cut.gated_rows, Start.normal),
    Rule("mlp.shared_experts.linear_fc2.weight", Cut.columns, Start.residual),
    Rule("mlp.router.weight", Cut.whole, Start.normal),
    Rule("mlp.experts.gate_up", Cut.experts_gated, Start.normal),
    Rule("mlp.experts.down", Cut.experts, Start.residual),
    Rule("output_layer.weight", Cut.rows, Start.normal),
)
AXES: dict[Cut, dict[int, str]] = {
    Cut.whole: {},
    Cut.rows: {0: "tp"},
    Cut.columns: {1: "tp"},
    Cut.gated_rows: {1: "tp"},
    Cut.experts_gated: {0: "ep", 2: "etp"},
    Cut.experts: {0: "ep", 2: "etp"},
}
"""Dimension of the logical tensor -> the axis of ranks that cuts it."""


def rule_of(name: str) -> Rule:
    """The row of a parameter's name; a parameter without one is a programming error."""
    matches = [rule for rule in RULES if name.endswith(rule.suffix)]
    assert len(matches) == 1, f"{name}: {len(matches)} rules"
    return matches[0]
