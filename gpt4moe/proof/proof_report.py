"""proof_report: a proof as text, as JSON, and the list of what it does not show."""

import dataclasses
from collections.abc import Callable
from math import isfinite
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpt4moe.config.kernels import AttentionKernel, ExpertKernel, NormKernel
from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.proof import bf16, plan
from gpt4moe.proof.compare import FAMILIES, TensorDifference, excess
from gpt4moe.proof.mesh import LARGEST_WORLD, lost, reductions
from gpt4moe.proof.prove import Proof
from gpt4moe.proof.replay import BUFFER_RULES, REPLAYED
from gpt4moe.proof.shrink import Shrunk, changes, recomputes_in_part

_SLIGHTLY = 3.0
_SLIGHT = (
    "this layout and one process are further apart than passes, but by less than three times. A small fault and "
    "unusually large round-off both look like this: prove it again with another run.seed, where a fault stays."
)
# Head of a column -> phases and kinds of tensor that it shows the worst of.
Columns = dict[str, tuple[tuple[str, str], ...]]
FAMILY_COLUMNS: Columns = {
    "gradient": ((plan.DESCENT, "gradient"),),
    "buffer": ((plan.DESCENT, "buffer"),),
    "weight after descent": ((plan.DESCENT, "weight"),),
    "weight after AdamW": ((plan.ADAMW, "weight"),),
    "exp_avg": ((plan.ADAMW, "exp_avg"),),
    "exp_avg_sq": ((plan.ADAMW, "exp_avg_sq"),),
}
BF16_COLUMNS: Columns = {
    "gradient": ((plan.ROUNDED, bf16.GRADIENTS),),
    "scale": ((plan.ROUNDED, bf16.SCALE),),
    **{kind: ((plan.ROUNDED, f"bf16 {kind}"),) for kind in ("buffer", "weight", "exp_avg", "exp_avg_sq")},
    "replayed": tuple((plan.ROUNDED, f"bf16 {kind} {bf16.MADE}") for kind in REPLAYED),
}


def show(proofs: list[Proof], console: Console) -> None:
    """Prints every mesh, then the verdict on all of them, then what it does not cover."""
    parts = [part for proof in proofs for part in _parts(proof)]
    parts += [*_verdict(proofs), Text(), Text("Not proved:", style="bold")]
    parts += [Text(f"  - {line}") for line in _not_proved(proofs)]
    console.print(Group(*parts, Text(f"{sum(proof.seconds for proof in proofs):.0f} s")))


def _not_proved(proofs: list[Proof]) -> list[str]:
    rounded = [proof.tensors[plan.ROUNDED] for proof in proofs if plan.ROUNDED in proof.tensors]
    return [*unproved([proof.shrunk for proof in proofs]), *([bf16.hidden_factors(rounded)] if rounded else [])]


def _verdict(proofs: list[Proof]) -> list[RenderableType]:
    asked, proved = proofs[0].shrunk.asked_layout, [proof.shrunk.layout for proof in proofs]
    wrong = [proof for proof in proofs if proof.is_different] or [proof for proof in proofs if proof.undecided]
    if wrong:
        on = "" if proved == [asked] else f" ({'; '.join(proof.shrunk.layout.describe() for proof in wrong)})"
        if wrong[0].undecided:
            return [
                Text(f"NOT DECIDED{on}: {wrong[0].undecided}. Prove it again with another run.seed.", "bold yellow")
            ]
        if all(map(_is_slight, wrong)):
            return [Text(f"DIFFERENT{on}: {_SLIGHT}", style="bold red")]
        return [Text(f"DIFFERENT: this layout{on} does not compute what one process computes.", style="bold red")]
    if proved[0] == asked:
        beside = "".join(f" So does {mesh.describe()}, where experts have copies." for mesh in proved[1:])
        return [Text(f"EQUAL: this layout computes what one process computes.{beside}", style="bold green")]
    meshes = f"{len(proved)} smaller meshes" if len(proved) > 1 else "a smaller mesh"
    equal = f"EQUAL on {meshes} of the kind of {asked.world_size} ranks: each computes what one process computes."
    return [
        Text(equal, style="bold green"),
        *(Text(f"NOT PROVED on any of them: {what}.", style="bold yellow") for what in lost(asked, proved)),
    ]


def _is_slight(proof: Proof) -> bool:
    """Whether nothing is off by more than a few times what passes, so that a slip of the tolerances is possible."""
    wrong = [item for items in proof.tensors.values() for item in items if item.is_different]
    numbers = [item for items in proof.numbers.values() for item in items if item.is_different]
    shares = [excess(item) for item in wrong] + [excess(item) for item in numbers]
    return not proof.problems and all(share <= _SLIGHTLY for share in shares)


def _parts(proof: Proof) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(proof.shrunk.layout.describe(), style="bold"), _table(proof)]
    if plan.ROUNDED in proof.tensors:
        parts += [Text(), _bf16_table(proof)]
    parts.append(Text())
    parts += [Text(line) for line in _number_lines(proof)]
    return [*parts, Text(), *_difference_lines(proof)]


def _table(proof: Proof) -> Table:
    table = Table(title="largest relative difference to one process", title_justify="left", box=None, pad_edge=False)
    table.add_column("tensors", no_wrap=True)
    heads = _rows(table, proof, FAMILY_COLUMNS, lambda item: f"{item.relative:.1e}")
    passes = [max(_compared(proof, FAMILY_COLUMNS[head][0]), default=0.0) for head in heads]
    table.add_section()
    table.add_row("tolerance", *(f"{value:.0e}" for value in passes), style="dim")
    return table


def _compared(proof: Proof, key: tuple[str, str]) -> list[float]:
    """The tolerances of a phase's tensors of one kind: alike, unless they were measured."""
    phase, kind = key
    return [item.tolerance for item in proof.tensors[phase] if item.kind == kind]


def _bf16_table(proof: Proof) -> Table:
    title = "in bf16: largest share of what rounding may make (more than 1 is different)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("tensors", no_wrap=True)
    _rows(table, proof, BF16_COLUMNS, lambda item: f"{excess(item):.2g}")
    return table


def _rows(table: Table, proof: Proof, columns: Columns, text: Callable[[TensorDifference], str]) -> list[str]:
    """Adds a column for every head of which something was compared, and a row for every family."""
    rows = families(proof)
    heads = [head for head, keys in columns.items() if any(key in row for row in rows.values() for key in keys)]
    for head in heads:
        table.add_column(head, justify="right")
    for family, row in rows.items():
        shown = [[row[key] for key in columns[head] if key in row] for head in heads]
        table.add_row(family, *(_cell(max(items, key=excess, default=None), text) for items in shown))
    return heads


def _cell(worst: TensorDifference | None, text: Callable[[TensorDifference], str]) -> Text:
    if worst is None:
        return Text("-", style="dim")
    return Text(text(worst), style="bold red" if worst.is_different else "green")


def families(proof: Proof) -> dict[str, dict[tuple[str, str], TensorDifference]]:
    """Family -> (phase, kind) -> the tensor that comes nearest to its tolerance, or passes it most."""
    rows: dict[str, dict[tuple[str, str], TensorDifference]] = {}
    for family in FAMILIES:
        for phase, items in proof.tensors.items():
            for item in items:
                key = (phase, item.kind)
                row = rows.setdefault(family, {}) if item.family == family else None
                if row is not None and (key not in row or excess(item) > excess(row[key])):
                    row[key] = item
    return rows


def _number_lines(proof: Proof) -> list[str]:
    lines = []
    rounded = [dataclasses.replace(item, name=f"bf16 {item.name}") for item in proof.numbers.get(plan.ROUNDED, [])]
    for item in [*proof.numbers[plan.DESCENT], *rounded]:
        verdict = f"different from step {item.first_step} on" if item.is_different else "equal"
        lines.append(f"{item.name}: {verdict}, {item.relative:.1e} at most ({item.tolerance:.0e} passes)")
    lines += [f"set aside, {reason}" for reason in proof.set_aside]
    lines += [proof.measured] if proof.measured else []
    return [*lines, f"clipped: {proof.clipped_steps} of {proof.steps} steps"]


def _difference_lines(proof: Proof) -> list[Text]:
    lines = [Text(f"between ranks: {problem}", style="red") for problem in proof.problems[:5]]
    if len(proof.problems) > 5:
        lines.append(Text(f"between ranks: {len(proof.problems) - 5} more like these", style="red"))
    if proof.first is not None:
        lines.append(Text(f"first to differ: {proof.first.kind} of {proof.first.name}, {proof.first.relative:.2e}"))
        lines += [Text(f"  {line}") for line in proof.where]
    lines += [Text(line) for line in proof.starts_at]
    lines += [Text(f"suspect: {line}", style="yellow") for line in proof.suspects]
    return [*lines, Text()] if lines else []


def as_data(proofs: list[Proof]) -> dict[str, Any]:
    """Everything, ready for JSON; a difference to what is not finite, itself infinite, is null."""
    asked = proofs[0].shrunk.asked_layout
    return {
        "failed": None,
        "equal": all(proof.is_equal for proof in proofs),
        "asked_layout": asked.describe(),
        "meshes": [_mesh_data(proof) for proof in proofs],
        "on_no_mesh": lost(asked, [proof.shrunk.layout for proof in proofs]),
        "not_proved": _not_proved(proofs),
        "seconds": sum(proof.seconds for proof in proofs),
    }


def failed_data(cause: str) -> dict[str, Any]:
    """The same keys where a rank failed, so that there is no proof."""
    nothing: dict[str, Any] = {"meshes": [], "on_no_mesh": [], "not_proved": []}
    return {"failed": cause, "equal": False, "asked_layout": None, **nothing, "seconds": None}


def _mesh_data(proof: Proof) -> dict[str, Any]:
    shrunk = proof.shrunk
    return {
        "equal": proof.is_equal,
        "verdict": proof.verdict,
        "undecided": proof.undecided or None,
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
        "ties_set_aside": proof.set_aside,
        "between_ranks": proof.problems,
        "first_difference": None if proof.first is None else {
            "tensor": proof.first.name, "kind": proof.first.kind, "relative": _finite(proof.first.relative),
            "where": proof.where,
        },
        "measured_tolerance": proof.measured or None,
        "starts_at": proof.starts_at,
        "suspects": proof.suspects,
        "seconds": proof.seconds,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def unproved(meshes: list[Shrunk]) -> list[str]:
    """What the proof of a run on these meshes does not show, one line each."""
    return [line for line in (*_mesh(meshes), *_sizes(meshes), *_hardware(meshes[0]), *_scope(meshes[0])) if line]


def _mesh(meshes: list[Shrunk]) -> list[str]:
    asked, proved = meshes[0].asked_layout, [shrunk.layout for shrunk in meshes]
    has_experts, has_copies = meshes[0].run.model.moe is not None, any(layout.expert_dp > 1 for layout in proved)
    copies = "" if has_copies or not has_experts else (
        "copies of experts: no proved mesh has any, so nothing summed experts' gradients over expert_dp"
    )  # fmt: skip
    if proved[0] == asked:
        beside = [f"copies of experts on that mesh, which has none: they were proved on {layout.describe()}"
                  for layout in proved[1:]]  # fmt: skip
        whole = f"more data-parallel ranks than dp {asked.dp}: the mesh was proved whole, at {asked.world_size} ranks"
        return [whole, copies, *beside]
    return [
        copies,
        *(f"the mesh itself: {asked.world_size} ranks were reduced to {layout.world_size} "
          f"({', '.join(reductions(asked, layout))})" for layout in proved),
        *(f"{what}: {LARGEST_WORLD} ranks are too few" for what in lost(asked, proved)),
    ]  # fmt: skip


def _sizes(meshes: list[Shrunk]) -> list[str]:
    proved: dict[str, list[str]] = {}
    for shrunk in meshes:
        for key, before, after in changes(shrunk):
            values = proved.setdefault(f"{key} {before}", [])
            values += [after] if after not in values else []
    changed = [f"{key} -> {' or '.join(values)}" for key, values in proved.items()]
    lost_part = recomputes_in_part(meshes[0].asked) and not any(recomputes_in_part(shrunk.run) for shrunk in meshes)
    return [
        f"the sizes: {', '.join(changed)}" if changed else "",
        "a stage that is recomputed in part: none of the proved stages is" if lost_part else "",
    ]


def _hardware(shrunk: Shrunk) -> list[str]:
    kernels, run = shrunk.asked.kernels, shrunk.asked
    named = (
        (kernels.attention is AttentionKernel.transformer_engine, "Transformer Engine's attention"),
        (kernels.norm is NormKernel.apex, "apex's norm"),
        (kernels.experts is ExpertKernel.grouped_mm, "the grouped product of experts"),
    )
    own = [key for key in ("swiglu", "rotary", "cross_entropy", "router") if getattr(kernels, key).value == "triton"]
    chosen = " and ".join([name for is_chosen, name in named if is_chosen] + [f"Triton's {key}" for key in own])
    extra = f", {chosen} that this run chooses" if chosen else ""
    return [
        f"GPU kernels{extra}: torch's CPU kernels ran",
        "NCCL, and overlap of communication with computation on GPU streams: gloo ran",
        "bf16 beyond rounding: forward and backward pass lie as near to fp32 as those of one process in bf16; what is "
        "small (the auxiliary losses' gradient) and sums in bf16 that belong in fp32 (gradients, logits) may hide there"
        if run.precision.dtype is Dtype.bf16 else "",
    ]  # fmt: skip


def _scope(shrunk: Shrunk) -> list[str]:
    engine, moe = shrunk.run.engine.kind, shrunk.run.model.moe
    unknown = [buffer.name for buffer in (moe.router.buffers if moe else ()) if buffer.name not in BUFFER_RULES]
    return [
        f"in bf16 the router's {', '.join(unknown)}: proof.replay has no rule that makes it of the loads"
        if unknown and shrunk.run.precision.dtype is not Dtype.fp32 else "",
        "the data pipeline, checkpoints, learning-rate schedule, speed and memory: synthetic tokens, a few steps",
        f"engine={engine.value} against itself: the one process ran engine=megatron"
        if engine is not EngineKind.megatron else "",
        "anything after the first steps: round-off may flip a choice between two equally probable experts later",
    ]  # fmt: skip
