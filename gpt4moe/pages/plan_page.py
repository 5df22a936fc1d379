"""A plan as one HTML page: numbers, stacked bars for memory of each stage and time of a step, Gantt chart.

planner.estimate.Estimate -> stacked bars (SVG), schedule_page.gantt -> HTML without script, link or request
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from gpt4moe.errors import ConfigError
from gpt4moe.pages.report_page import POLICY, STYLE
from gpt4moe.pages.schedule_page import gantt
from gpt4moe.pipeline.schedule import schedule, simulate
from gpt4moe.planner.estimate import Estimate
from gpt4moe.planner.stacks import stack_text
from gpt4moe.runlog.run_files import replace_file

PART_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#5b6775",
    "#8c6bb1",
    "#a6761d",
)
"""Okabe and Ito's colours, which colour-blind readers can distinguish, and two more."""
WIDTH, LEFT, ROW = 1100.0, 90.0, 22.0
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "images", "buffers", "reserve")
MOST_ROUNDS = 3
"""Micro-batches in the chart, as a multiple of pp. More micro-batches would only repeat the steady state."""


PHASE_COLUMNS = (
    "steps", "batch [seq]", "length", "shares", "tokens", "memory [GB]", "step [s]", "days", "cost [USD]",
)  # fmt: skip


NO_PRICE = "not known: cluster.usd_per_hour=..."


def known_text(number: float | None, form: str = ",.0f", *, missing: str = "not known") -> str:
    """A number as a table shows it. Args: form: a format of numbers; missing: the text in place of None."""
    return missing if number is None else f"{number:{form}}"


def with_range(text: str, likely: tuple[float, float] | None, form: str = ",.3g") -> str:
    """A number with what it may turn out as: 154 (124 to 235). Args: likely: Estimate.likely of it."""
    return text if likely is None else f"{text} ({likely[0]:{form}} to {likely[1]:{form}})"


STACK = "time by constants of stack"


def unbuilt_mark(result: Estimate) -> str:
    """What stands beside a plan that the trainer cannot build; empty: it can."""
    return "; THE TRAINER CANNOT BUILD IT" if result.unbuilt else ""


def phase_rows(result: Estimate) -> list[tuple[str, ...]]:
    """Of each phase of the run, in words: PHASE_COLUMNS."""
    return [
        (
            f"{phase.first_step:,} to {phase.first_step + phase.steps - 1:,}", f"{phase.global_batch_size:,}",
            f"{phase.seq_length:,}", "data.sources" if phase.shares is None else _shares(phase.shares),
            f"{phase.tokens:.4g}", f"{phase.peak_memory_bytes / 1e9:.1f}",
            with_range(f"{phase.step_seconds:.4g}", result.likely(phase.step_seconds)),
            with_range(f"{phase.seconds / 86400:.4g}", result.likely(phase.seconds / 86400)),
            with_range(
                known_text(result.phase_usd(phase)), result.likely(result.phase_usd(phase)), ",.0f"
            ),
        )
        for phase in result.phases
    ]  # fmt: skip


def _shares(shares: dict[str, float]) -> str:
    total = sum(shares.values())
    return ", ".join(f"{name} {share / total:.1%}" for name, share in shares.items() if share)


def _phases(result: Estimate) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in PHASE_COLUMNS)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in phase_rows(result))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def write_plan_page(path: Path | str, result: Estimate, more: Mapping[str, str] | None = None) -> None:
    """Writes the page of one plan. Args: more: title -> HTML of further sections."""
    title = f"{result.plan.model.name}: plan"
    memory = {
        f"stage {stage.stage}": {line: getattr(stage, f"{line}_bytes") / 1e9 for line in MEMORY_PARTS}
        for stage in result.memory
    }
    limit = result.plan.cluster.memory_bytes / 1e9
    body = (
        f'<h1>{escape(title)}</h1><p class="under-title">{escape(result.layout.describe())} of '
        f"{escape(result.plan.cluster.name)}; {STACK}: {escape(stack_text(result.plan))}{unbuilt_mark(result)}</p>"
        f'<p class="verdict">{escape(result.bottleneck)}</p>'
        f'<dl class="cards">{_cards(result)}</dl>{_warnings(result)}'
        + section("Memory of the fullest rank of each stage", stacked_bars(memory, unit="GB", limit=limit))
        + section("Time of a step", stacked_bars({"step": result.step.parts}, unit="s"))
        + (section("Phases", _phases(result)) if len(result.phases) > 1 else "")
        + "".join(section(title, content) for title, content in (more or {}).items())
        + section("Pipeline", _pipeline(result))
    )
    write_page(path, title, body)


def write_page(path: Path | str, title: str, body: str) -> None:
    """Writes a page without scripts and links, with an atomic rename: a reader sees the old or the new one, whole.

    Args:
        body: HTML.
    Raises: ConfigError where the page cannot be written.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )
    try:
        replace_file(Path(path), page.encode())
    except OSError as error:
        raise ConfigError(
            f"file={path} cannot be written: {error.strerror}.", "Set file to a name in a folder where you may write."
        ) from error


def stacked_bars(rows: Mapping[str, Mapping[str, float]], *, unit: str, limit: float | None = None) -> str:
    """A figure with one horizontal bar for each row, its parts side by side, and a legend.

    Args:
        rows: name -> part -> value; every row has the same parts.
        limit: where to draw a vertical line, such as the memory of a device.
    """
    parts = [part for part in next(iter(rows.values())) if any(row[part] for row in rows.values())]
    most = max([sum(row.values()) for row in rows.values()] + [limit or 0.0])
    scale, height = (WIDTH - LEFT - 70) / most, ROW * len(rows) + 24
    drawn = []
    for index, (name, row) in enumerate(rows.items()):
        y, x = ROW * index, LEFT
        drawn.append(f'<text x="{LEFT - 8:g}" y="{y + 14:g}" text-anchor="end">{escape(name)}</text>')
        for part in parts:
            width = row[part] * scale
            words = f"{name}, {part}: {row[part]:.4g} {unit}"
            area = f'x="{x:.1f}" y="{y + 2:g}" width="{width:.1f}" height="{ROW - 4:g}"'
            drawn.append(f'<rect {area} fill="{_colour(parts, part)}"><title>{escape(words)}</title></rect>')
            x += width
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 14:g}">{sum(row.values()):.4g} {unit}</text>')
    if limit is not None:
        x = LEFT + limit * scale
        drawn.append(f'<line class="level l0" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20:g}"/>')
        drawn.append(
            f'<text x="{x:.1f}" y="{height - 6:g}" text-anchor="middle">a device has {limit:.4g} {unit}</text>'
        )
    keys = "".join(
        f'<span style="border-left:12px solid {_colour(parts, part)};padding-left:6px">{escape(part)}</span>'
        for part in parts
    )
    return (
        f'<figure class="chart wide"><div class="legend">{keys}</div>'
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img">{"".join(drawn)}</svg></figure>'
    )


def _colour(parts: list[str], part: str) -> str:
    return PART_COLOURS[parts.index(part) % len(PART_COLOURS)]


def _cards(result: Estimate) -> str:
    kwh, energy = result.cost.kwh, "not known"
    if kwh is not None:
        used, unit = (kwh / 1e6, "GWh") if kwh > 1e5 else (kwh, "kWh")
        energy = with_range(f"{used:,.3g} {unit}", result.likely(used))
    cards = {
        "step": with_range(f"{result.step.seconds:.3g} s", result.likely(result.step.seconds)),
        "MFU": f"{100 * result.mfu:.1f}%",
        "throughput": f"{result.tokens_per_second:,.0f} tokens/s",
        "time": with_range(f"{result.days:.3g} days", result.likely(result.days)),
        "cost": with_range(
            f"{result.cost.usd:,.0f} USD" if result.cost.usd is not None else NO_PRICE,
            result.likely(result.cost.usd),
            ",.0f",
        ),
        "energy": energy,
        "fullest device": f"{result.peak_memory_bytes / 1e9:.1f} GB",
        "parameters": f"{result.parameters.total / 1e9:,.1f} billion",
    }
    return "".join(f'<div class="card"><dt>{name}</dt><dd>{value}</dd></div>' for name, value in cards.items())


def _warnings(result: Estimate) -> str:
    return "".join(f'<p class="bad">{escape(text)}</p>' for text in result.warnings)


def section(title: str, content: str) -> str:
    """HTML. Args: content: HTML; the title is a text."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _pipeline(result: Estimate) -> str:
    pp, vpp, all_of_them = result.layout.pp, result.layout.vpp, result.step.micro_batches
    shown = min(all_of_them, MOST_ROUNDS * pp)
    table = schedule(pp=pp, vpp=vpp, micro_batches=shown)
    each = [result.step.stages[stage % pp] / vpp for stage in range(pp * vpp)]
    timeline = simulate(table, forward=[t / 3 for t in each], backward=[2 * t / 3 for t in each])
    words = f"{shown} of {all_of_them} micro-batches of a step; forward blue, backward orange"
    return (
        f'<figure class="chart wide"><h3>{words}</h3>{gantt(timeline, label=f"Pipeline schedule: {words}", unit="s")}'
        "</figure>"
    )
