"""What a run reads of each source, as a table with bars, for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from gpt4moe.runlog.console import short_count

BAR_CELLS = 24


def mixture_table(found: dict[str, Any]) -> Iterator[RenderableType]:
    """Args: found: data.overview.overview."""
    table = Table(title="planned, nothing is on disk" if found["is_planned"] else ", ".join(found["folders"]))
    for heading in ("source", "tokens", "share", "", "samples", "read", "epochs", "at most", "disk", "origin"):
        table.add_column(heading, justify="left" if heading in ("source", "", "origin") else "right")
    for one in found["sources"]:
        most = "" if one["max_epochs"] is None else f"{one['max_epochs']:g}"
        table.add_row(
            one["source"], short_count(one["tokens"]), f"{one['share']:.2%}",
            "█" * max(1, round(BAR_CELLS * one["share"])), f"{one['samples']:,}",
            short_count(one["tokens_read"]), f"{one['epochs']:.3g}", most, _size(one["disk_bytes"]), one["origin"],
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "all", short_count(found["tokens"]), "100%", "", f"{found['samples']:,}", short_count(found["tokens_read"]),
        "", "", _size(found["disk_bytes"]), "",
    )  # fmt: skip
    yield table
    for phase in found["phases"][1:]:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in phase["shares"].items())
        yield f"from sample {phase['first_sample']:,}: {shares}"
    for span in found["batches"] if len(found["batches"]) > 1 else []:
        yield (
            f"from step {span['first_step'] + 1:,}, sample {span['first_sample']:,}: "
            f"{span['global_batch_size']:,} sequences of {span['seq_length']:,} tokens a step, {span['steps']:,} steps"
        )


def _size(num_bytes: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 1e3:.3g} kB"
