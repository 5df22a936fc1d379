"""A GPU rehearsal as text for people and as JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt4moe.gpu_rehearsal.steps import GpuRehearsal


def as_data(done: GpuRehearsal) -> dict[str, Any]:
    """The rehearsal of one step as JSON."""
    notes, roofline = done.notes, done.notes.roofline
    return {
        "problems": list(notes.problems),
        "host_syncs": {f"{place} ({what})": count for (place, what), count in notes.host_syncs.most_common()},
        "overlapped_waits": {str(place): asdict(waits) for place, waits in notes.overlapped.items()},
        "kernels": notes.kernels,
        "kernels_per_layer": round(done.kernels_per_layer, 1),
        "collectives": dict(sorted(notes.collectives.items())),
        "aten_operations": notes.aten_operations,
        "allocations": {
            "number": notes.allocations,
            "bytes": notes.allocated_bytes,
            "largest_bytes": notes.largest[0],
            "largest_at": str(notes.largest[1]),
        },
        "evaluation_host_syncs": sum(done.evaluation_syncs.values()),
        "attention": notes.attention_calls,
        "attention_bytes": {kernel: size for (kernel, size), _ in notes.attention.items() if size},
        "mfu_ceiling": float(f"{done.mfu_ceiling:.3g}"),
        "parts": roofline.as_data(),
        "assumes": str(roofline.assumptions),
        "is_measured": False,
        "model": done.run.model.name,
        "layout": done.layout.describe(),
        "rank": done.rank,
        "cluster": done.run.cluster.name,
    }


def show(done: GpuRehearsal, seconds: float, console: Console) -> None:
    """The rehearsal for people."""
    notes, at = done.notes, done.layout.coordinate(done.rank)
    place = " ".join(f"{axis} {index}" for axis, index in at.items())
    console.print(f"{done.run.model.name}: {done.layout.describe()}", markup=False)
    console.print(
        f"rank {done.rank} ({place}) on a fake {done.run.cluster.name}: {done.num_layers} layers, "
        f"{done.num_micro_batches} micro-batches, engine={done.run.engine.kind.value}",
        markup=False,
    )
    for (kernel, size), times in sorted(notes.attention.items()):
        kept = f", {size / 1e9:.3g} GB of scores a call" if size else ""
        console.print(f"attention: {times} calls of {kernel}{kept}", markup=False)
    console.print(
        f"kernels: {notes.kernels} a step, {done.kernels_per_layer:.0f} a layer and micro-batch forward and backward; "
        f"{notes.aten_operations} aten operations"
    )
    largest, made_at = notes.largest
    console.print(
        f"allocations: {notes.allocations} a step, {notes.allocated_bytes / 1e9:.3g} GB in all; the largest is "
        f"{largest / 1e9:.3g} GB at {made_at}",
        markup=False,
    )
    calls = ", ".join(f"{count} {name}" for name, count in sorted(notes.collectives.items()))
    console.print(f"collectives: {calls or 'none'}", markup=False)
    _show_syncs(done, console)
    _show_parts(done, console)
    for problem in notes.problems:
        console.print(f"[bold red]wrong:[/] {problem.replace('[', chr(92) + '[')}")
    verdict = "[bold red]A GPU WOULD REFUSE THIS[/]" if notes.problems else "[bold green]NOTHING REFUSED[/]"
    console.print(f"{verdict} after {seconds:.0f} s; nothing ran on a GPU")


def _show_syncs(done: GpuRehearsal, console: Console) -> None:
    syncs = done.notes.host_syncs
    evaluation = sum(done.evaluation_syncs.values())
    console.print(
        f"host syncs: {sum(syncs.values())} a step, {evaluation} an evaluation of the first micro-batches; "
        "in a step the host waits for the GPU at"
    )
    for (place, what), count in syncs.most_common():
        console.print(f"  {count:5d}  {place} ({what})", markup=False)
    for at, waits in done.notes.overlapped.items():
        console.print(
            f"  {waits.count:5d}  {at}, no host sync: the GPU has {waits.least_kernels} kernels or more meanwhile, "
            f"{waits.least_seconds * 1e6:.0f} us by the assumptions below",
            markup=False,
        )


def _show_parts(done: GpuRehearsal, console: Console) -> None:
    roofline = done.notes.roofline
    total = roofline.bound_seconds
    if not total:
        return
    table = Table("part", "kernels", "GB", "TFLOP", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in roofline.as_data().items():
        share = f"{part['bound_seconds'] / total:.1%}"
        size, flops = part["memory_bytes"] / 1e9, part["flops"] / 1e12
        table.add_row(name, str(int(part["kernels"])), f"{size:.4g}", f"{flops:.4g}", share)
    console.print("parts of the bound, this rank, one step:")
    console.print(table)
    console.print(f"MFU ceiling: {done.mfu_ceiling:.3f} of {roofline.peak_flops / 1e12:.4g} TFLOP/s, not measured")
    console.print(f"it assumes {roofline.assumptions}", markup=False)
