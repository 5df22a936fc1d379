"""What tools/rehearse.py does: reads its arguments, rehearses, prints text or JSON; progress goes to stderr.

arguments --read--> RehearsalRequest --load--> run --rehearse--> report, exit status
"""

import json
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel import local_ranks
from gpt4moe.parallel.layout import fewest_ranks
from gpt4moe.rehearsal.files import CheckpointFiles, InferenceFiles
from gpt4moe.rehearsal.rehearsal import Rehearsal, rehearse, total_bytes
from gpt4moe.runlog.command_line import split_arguments

_OWN = ("ranks", "out", "inference", "output")


@dataclass(frozen=True, slots=True)
class RehearsalRequest:
    """The arguments of the tool."""

    overrides: list[str]
    ranks: int | None
    out: Path | None
    inference: tuple[int, int] | None
    as_json: bool


def read(arguments: list[str]) -> RehearsalRequest:
    """Raises: ConfigError for a value that an argument cannot have."""
    own, overrides, as_json = split_arguments(arguments, _OWN, "rehearsal")
    if not re.fullmatch(r"[1-9]\d*", own.get("ranks", "1")):
        raise ConfigError(f"ranks={own['ranks']} is no number of ranks.", "Write ranks=24960, or leave it out.")
    grid = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", own.get("inference", "8x16"))
    if not grid:
        raise ConfigError(
            f"inference={own['inference']} is no grid.", "Write inference=8x16 (tp x pp), or leave it out."
        )
    return RehearsalRequest(
        overrides=overrides,
        ranks=int(own["ranks"]) if "ranks" in own else None,
        out=Path(own["out"]) if "out" in own else None,
        inference=(int(grid[1]), int(grid[2])) if "inference" in own else None,
        as_json=as_json,
    )


def run(request: RehearsalRequest) -> int:
    """Rehearses and prints; 0 when everything fits together, else 1. Raises: Gpt4MoeError for bad input."""
    asked = load_run_config(request.overrides)
    local_ranks.preload("gpt4moe.rehearsal.preload")
    local_ranks.start_server()
    started = time.monotonic()
    with ExitStack() as stack:
        out = request.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rehearsal-")))
        bar = stack.enter_context(_progress())
        task = bar.add_task("ranks built", total=None)
        rehearsal = rehearse(
            asked, request.ranks or world_of(asked), out, request.inference,
            on_start=lambda total: bar.update(task, total=total), on_rank=lambda: bar.advance(task),
            on_stage=lambda words: bar.update(task, description=words),
        )  # fmt: skip
    seconds = time.monotonic() - started
    if request.as_json:
        sys.stdout.write(json.dumps(as_data(rehearsal, seconds), indent=1) + "\n")
    else:
        show(rehearsal, seconds, _console(), kept=request.out is not None)
    return 1 if rehearsal.problems else 0


def world_of(run: RunConfig) -> int:
    """The cluster's devices, or the fewest that hold the layout."""
    return run.cluster.devices or fewest_ranks(run.parallel)


def as_data(rehearsal: Rehearsal, seconds: float) -> dict[str, Any]:
    """The rehearsal as JSON."""
    peak = rehearsal.peak
    planned = rehearsal.planned[rehearsal.stage(peak)]
    return {
        "fits_together": not rehearsal.problems,
        "problems": rehearsal.problems,
        "not_rehearsed": rehearsal.not_rehearsed,
        "world_size": rehearsal.layout.world_size,
        "layout": rehearsal.layout.describe(),
        "seconds": round(seconds, 1),
        "ranks": [
            {"rank": r.rank, **rehearsal.layout.coordinate(r.rank), "parameters": r.parameters}
            | {f"{kind}_bytes": size for kind, size in asdict(r.held).items()}
            for r in rehearsal.ranks
        ],
        "peak": {"rank": peak.rank, **asdict(planned), "total_bytes": total_bytes(peak.held, planned)},
        "checkpoint": _written(rehearsal.checkpoint),
        "inference": _written(rehearsal.inference),
    }


def _written(files: CheckpointFiles | InferenceFiles | None) -> dict[str, Any] | None:
    return asdict(files) | {"folder": str(files.folder)} if files else None


def show(rehearsal: Rehearsal, seconds: float, console: Console, *, kept: bool) -> None:
    """The rehearsal for people."""
    layout = rehearsal.layout
    console.print(f"{rehearsal.run.model.name}: {layout.describe()}")
    sizes_of = ("weights", "gradients", "optimizer", "with activations")
    table = Table("stage", "ranks built", "parameters", *(f"{what} [GB]" for what in sizes_of))
    for column in table.columns[2:]:
        column.justify = "right"
    for stage, planned in enumerate(rehearsal.planned):
        built = [report for report in rehearsal.ranks if rehearsal.stage(report) == stage]
        most = max(built, key=lambda report: total_bytes(report.held, planned))
        sizes = (most.held.weights, most.held.gradients, most.held.optimizer, total_bytes(most.held, planned))
        ranks = f"{len(built)}: {built[0].rank} to {built[-1].rank}"
        table.add_row(str(stage), ranks, f"{most.parameters:,}", *(f"{size / 1e9:.4g}" for size in sizes))
    console.print("the fullest rank built of each stage:")
    console.print(table)
    for line in _lines(rehearsal, kept):
        console.print(line, markup=False)
    for missing in rehearsal.not_rehearsed:
        console.print(f"not rehearsed: {missing}", markup=False)
    for problem in rehearsal.problems:
        console.print(f"[bold red]wrong:[/] {problem.replace('[', chr(92) + '[')}")
    verdict = "[bold red]DOES NOT FIT TOGETHER[/]" if rehearsal.problems else "[bold green]FITS TOGETHER[/]"
    console.print(f"{verdict} after {seconds:.0f} s")


def _lines(rehearsal: Rehearsal, kept: bool) -> list[str]:
    peak, checkpoint, serving = rehearsal.peak, rehearsal.checkpoint, rehearsal.inference
    stage = rehearsal.stage(peak)
    total = total_bytes(peak.held, rehearsal.planned[stage])
    memory = rehearsal.run.cluster.memory_bytes
    at = rehearsal.layout.coordinate(peak.rank)
    place = " ".join(f"{axis} {index}" for axis, index in at.items())
    lines = [
        f"built: {len(rehearsal.ranks)} of {rehearsal.layout.world_size} ranks: the first of every stage, of each kind "
        "of stage the first and last of every axis and the fullest; groups and bytes are compared on each",
        f"peak: rank {peak.rank} ({place}), {_size(total)} of {_size(memory)}; states as built, "
        "activations and buffers as planned",
    ]
    if checkpoint:
        lines.append(
            f"checkpoint: {checkpoint.files} files, {_size(checkpoint.size_bytes)}, manifest "
            f"{_size(checkpoint.manifest_bytes)}; {checkpoint.elements['weight']:,} weights"
        )
    if serving:
        lines.append(
            f"inference: {serving.files} files of tp {serving.tp} x pp {serving.pp}, {_size(serving.size_bytes)} "
            f"in bf16, the largest {_size(serving.largest_bytes)}, index {_size(serving.index_bytes)}; "
            f"layers per stage {serving.layers_per_stage}"
        )
        if serving.reads and not serving.problems:
            reads = serving.reads
            lines.append(
                f"reading: {reads.ranks} ranks read {reads.shards} shards, each by exactly the rank that needs it, "
                f"{_size(reads.least_bytes)} to {_size(reads.most_bytes)} each, {_size(reads.total_bytes)} together"
            )
    if kept and checkpoint:
        lines.append(f"written without data: {checkpoint.folder.parents[1]}")
    return lines


def _size(number: float) -> str:
    """Bytes in the unit that fits: small models are rehearsed too."""
    unit, name = next((one for one in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if number >= one[0]), (1e3, "kB"))
    return f"{number / unit:.4g} {name}"


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
