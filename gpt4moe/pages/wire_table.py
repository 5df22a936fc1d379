"""Bytes on the wire of one step as a table: counted, by the papers' formulas, and what the engine sends besides."""

import html
from collections.abc import Mapping
from dataclasses import dataclass

from gpt4moe.planner.communication import Traffic

MEANING = {
    "tp": "activations between the matrices of a block, norms' gradients", "cp": "keys and values",
    "tp_cp": "what routers pool", "ep": "tokens to their experts and back", "etp": "tokens of cut experts",
    "expert_dp": "experts: gradients scattered, weights gathered", "dp": "how many tokens the loss counts",
    "dp_cp": "dense parameters: gradients scattered, weights gathered", "pp": "activations and gradients of stages",
    "embedding": "a tied embedding's gradient", "world": "loss and routing for the log, the gradient norm",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class WireCount:
    """One step of all ranks: group -> kind of operation -> bytes sent."""

    step: int
    counted: Mapping[str, Mapping[str, int]]
    formula: Traffic
    """With even routing."""


def wire_table(wire: WireCount) -> str:
    """HTML: a row for each group and kind, and the engine's surplus as a row of its own."""
    pairs = {(group, kind): None for sent in (wire.counted, wire.formula) for group in sent for kind in sent[group]}
    rows, total, more = [], 0.0, 0.0
    for group, kind in pairs:
        size, expected = (sent.get(group, {}).get(kind, 0.0) for sent in (wire.counted, wire.formula))
        total, more = total + size, more + size - expected
        cells = (group, kind.replace("_", "-"), MEANING.get(group, ""), *map(_size, (size, expected)))
        rows.append([html.escape(cell) for cell in cells])
    share = f"{more / total:.2%} of all: statistics, norms, padding, recomputation, uneven routing" if total else ""
    rows.append(["surplus", "", share, _size(more), ""])
    head = "".join(f"<th>{name}</th>" for name in ("group", "operation", "what for", "sent", "by formula"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<p>Counted at the collectives of step {wire.step}, all ranks together, as a ring sends them. Formulas assume "
        f'even routing.</p><div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _size(size: float) -> str:
    """Four digits and a unit: 1.234 MB."""
    if not size:
        return "none"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.4g} B"
