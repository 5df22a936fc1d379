"""A proof for people (rich) and for programs (plain nested data)."""

from math import isfinite
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpt4moe.proof import compare, plan
from gpt4moe.proof.compare import FAMILIES, TensorDifference
from gpt4moe.proof.mesh import lost, reductions
from gpt4moe.proof.prove import Proof
from gpt4moe.proof.shrink import changes
from gpt4moe.proof.unproved import unproved

# Phase, kind of tensor -> head of its column.
COLUMNS = {
    (plan.DESCENT, "gradient"): "gradient",
    (plan.DESCENT, "buffer"): "buffer",
    (plan.DESCENT, "weight"): "weight after descent",
    (plan.ADAMW, "weight"): "weight after AdamW",
    (plan.ADAMW, "exp_avg"): "exp_avg",
    (plan.ADAMW, "exp_avg_sq"): "exp_avg_sq",
    (plan.ROUNDED, "bf16 gradient"): "bf16 gradient",
}


def show(proofs: list[Proof], console: Console) -> None:
    """One mesh after the other, then the verdict on all, and what it does not cover."""
    parts = [part for proof in proofs for part in _parts(proof)]
    parts += [*_verdict(proofs), Text(), Text("Not proved:", style="bold")]
    parts += [Text(f"  - {line}") for line in unproved([proof.shrunk for proof in proofs])]
    console.print(Group(*parts, Text(f"{sum(proof.seconds for proof in proofs):.0f} s")))


def _verdict(proofs: list[Proof]) -> list[RenderableType]:
    asked, proved = proofs[0].shrunk.asked_layout, [proof.shrunk.layout for proof in proofs]
    wrong = [proof.shrunk.layout.describe() for proof in proofs if not proof.is_equal]
    if wrong:
        on = "" if proved == [asked] else f" ({'; '.join(wrong)})"
        return [Text(f"DIFFERENT: this layout{on} does not compute what one process computes.", style="bold red")]
    if proved == [asked]:
        return [Text("EQUAL: this layout computes what one process computes.", style="bold green")]
    meshes = f"{len(proved)} smaller meshes" if len(proved) > 1 else "a smaller mesh"
    equal = f"EQUAL on {meshes} of the kind of {asked.world_size} ranks: each computes what one process computes."
    return [
        Text(equal, style="bold green"),
        *(Text(f"NOT PROVED on any of them: {what}.", style="bold yellow") for what in lost(asked, proved)),
    ]


def _parts(proof: Proof) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(proof.shrunk.layout.describe(), style="bold"), _table(proof), Text()]
    parts += [Text(line) for line in _number_lines(proof)]
    return [*parts, Text(), *_difference_lines(proof)]


def _table(proof: Proof) -> Table:
    table = Table(title="largest relative difference to one process", title_justify="left", box=None, pad_edge=False)
    table.add_column("tensors", no_wrap=True)
    rows = families(proof)
    kinds = [key for key in COLUMNS if any(key in row for row in rows.values())]
    for key in kinds:
        table.add_column(COLUMNS[key], justify="right")
    for family, row in rows.items():
        cells = [_cell(row.get(key)) for key in kinds]
        table.add_row(family, *cells)
    tolerances = {**{(plan.DESCENT, k): t for k, t in compare.DESCENT.items()},
                  **{(plan.ADAMW, k): t for k, t in compare.ADAMW.items()}}  # fmt: skip
    table.add_section()
    table.add_row(
        "tolerance",
        *(f"{tolerances[key].value:.0e}" if key in tolerances else "3 x 1 rank" for key in kinds),
        style="dim",
    )
    return table


def _cell(worst: TensorDifference | None) -> Text:
    if worst is None:
        return Text("-", style="dim")
    return Text(f"{worst.relative:.1e}", style="bold red" if worst.is_different else "green")


def families(proof: Proof) -> dict[str, dict[tuple[str, str], TensorDifference]]:
    """Family -> (phase, kind) -> the tensor that comes nearest to its tolerance, or passes it most."""
    rows: dict[str, dict[tuple[str, str], TensorDifference]] = {}
    for family, _ in FAMILIES:
        for phase, items in proof.tensors.items():
            for item in items:
                key = (phase, item.kind)
                row = rows.setdefault(family, {}) if item.family == family else None
                if row is not None and (key not in row or _excess(item) > _excess(row[key])):
                    row[key] = item
    return rows


def _excess(item: TensorDifference) -> float:
    return item.relative / item.tolerance if item.tolerance else item.relative


def _number_lines(proof: Proof) -> list[str]:
    lines = []
    for item in proof.numbers[plan.DESCENT]:
        verdict = f"different from step {item.first_step} on" if item.is_different else "equal"
        lines.append(f"{item.name}: {verdict}, {item.relative:.1e} at most ({item.tolerance:.0e} passes)")
    lines += [f"set aside, {tie}" for tie in proof.ties]
    return [*lines, f"clipped: {proof.clipped_steps} of {proof.steps} steps"]


def _difference_lines(proof: Proof) -> list[Text]:
    lines = [Text(f"between ranks: {problem}", style="red") for problem in proof.problems[:5]]
    if len(proof.problems) > 5:
        lines.append(Text(f"between ranks: {len(proof.problems) - 5} more like these", style="red"))
    if proof.first is not None:
        lines.append(Text(f"first to differ: {proof.first.kind} of {proof.first.name}, {proof.first.relative:.2e}"))
        lines += [Text(f"  {line}") for line in proof.where]
    lines += [Text(f"suspect: {line}", style="yellow") for line in proof.suspects]
    return [*lines, Text()] if lines else []


def as_data(proofs: list[Proof]) -> dict[str, Any]:
    """Everything, ready for JSON; a difference to what is not finite, itself infinite, is null."""
    asked = proofs[0].shrunk.asked_layout
    return {
        "equal": all(proof.is_equal for proof in proofs),
        "asked_layout": asked.describe(),
        "meshes": [_mesh_data(proof) for proof in proofs],
        "on_no_mesh": lost(asked, [proof.shrunk.layout for proof in proofs]),
        "not_proved": unproved([proof.shrunk for proof in proofs]),
        "seconds": sum(proof.seconds for proof in proofs),
    }


def _mesh_data(proof: Proof) -> dict[str, Any]:
    shrunk = proof.shrunk
    return {
        "equal": proof.is_equal,
        "layout": shrunk.layout.describe(),
        "reduced": reductions(shrunk.asked_layout, shrunk.layout),
        "changes": [{"key": key, "asked": before, "proved": after} for key, before, after in changes(shrunk)],
        "families": [
            {"family": family, "phase": phase, "kind": kind, "tensor": item.name, "relative": _finite(item.relative),
             "tolerance": _finite(item.tolerance), "equal": not item.is_different}
            for family, row in families(proof).items() for (phase, kind), item in row.items()
        ],
        "numbers": [
            {"phase": phase, "name": item.name, "relative": _finite(item.relative),
             "tolerance": _finite(item.tolerance), "equal": not item.is_different,
             "first_different_step": item.first_step}
            for phase, items in proof.numbers.items() for item in items
        ],
        "clipped_steps": proof.clipped_steps,
        "ties_set_aside": proof.ties,
        "between_ranks": proof.problems,
        "first_difference": None if proof.first is None else {
            "tensor": proof.first.name, "kind": proof.first.kind, "relative": _finite(proof.first.relative),
            "where": proof.where,
        },
        "suspects": proof.suspects,
        "seconds": proof.seconds,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
