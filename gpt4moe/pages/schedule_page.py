"""A pipeline step for people: lines of text, records for JSON, and a Gantt chart as inline SVG.

    Timeline -> gantt: a row for each rank, a bar for each slot -> <svg>, the same bytes for the same timeline
    PipelinePlan -> schedule_text, schedule_json, schedule_svg, schedule_section (of the report)

Forward passes are blue, backward passes orange: Okabe and Ito's colours, distinct for colour-blind readers and in grey.
Later chunks of a rank are paler. A bar shows its micro-batch if there is room, and everything else in a tooltip.
"""

import json
from collections.abc import Sequence
from html import escape

from gpt4moe.pages.charts import axis_number, nice_step
from gpt4moe.pipeline.schedule import Pass, Slot, Timeline
from gpt4moe.planner.pipeline_plan import PipelinePlan

UNIT = "1 = forward pass of an average stage, by FLOP"


def schedule_text(plan: PipelinePlan, problems: Sequence[str] = ()) -> str:
    """One line for each rank, slots in order. F3: forward pass of micro-batch 3; B1.3: backward pass of it in chunk 1.

    Args:
        problems: of the messages between stages.
    """
    cells = [[_cell(slot, plan.vpp) for slot in slots] for slots in plan.timeline.table]
    width = max(len(cell) for row in cells for cell in row)
    rows = [f"rank {rank:<3} " + " ".join(cell.ljust(width) for cell in row).rstrip() for rank, row in enumerate(cells)]
    key = "F forward, B backward, then " + ("chunk.micro-batch" if plan.vpp > 1 else "micro-batch")
    of_chunks = " of a chunk" if plan.vpp > 1 else ""
    held = [
        f"rank {rank:<3} layers {_layers(plan, rank)}; held at most: micro-batches{of_chunks} {count:g}, "
        f"layers of activations {layers:g}"
        for rank, (count, layers) in enumerate(zip(plan.live, plan.live_layers, strict=True))
    ]
    messages = problems or (["messages: every send meets its receive, in order"] if plan.pp > 1 else [])
    return "\n".join([headline(plan), f"slots in order ({key}):", *rows, *held, *messages])


def headline(plan: PipelinePlan) -> str:
    chunks = f" x vpp {plan.vpp}" if plan.vpp > 1 else ""
    kind = "interleaved 1F1B" if plan.vpp > 1 else "1F1B" if plan.pp > 1 else "no pipeline"
    even = (plan.pp - 1) / (plan.vpp * plan.micro_batches)
    unlike = f" ({even:.1%} if its stages were equal)" if abs(even - plan.bubble_share) > 5e-4 else ""
    return (
        f"{kind}, pp {plan.pp}{chunks}, {plan.micro_batches} micro-batches a rank: idle {plan.bubble_share:.1%} of the "
        f"computing time{unlike}."
    )


def schedule_json(plan: PipelinePlan, problems: Sequence[str] = ()) -> str:
    """The summary and every slot."""
    timeline = plan.timeline
    slots = [
        {
            "rank": rank, "slot": place, "pass": slot.direction.value, "chunk": slot.chunk,
            "micro_batch": slot.micro_batch, "start": timeline.starts[rank][place], "end": timeline.ends[rank][place],
        }
        for rank, row in enumerate(timeline.table)
        for place, slot in enumerate(row)
    ]  # fmt: skip
    summary = {
        "pp": plan.pp, "vpp": plan.vpp, "micro_batches": plan.micro_batches, "bubble_share": plan.bubble_share,
        "time_unit": UNIT, "total": timeline.total, "stage_layers": plan.stage_layers, "live": plan.live,
        "live_layers": plan.live_layers, "message_problems": list(problems), "slots": slots,
    }  # fmt: skip
    return json.dumps(summary, indent=1)


def schedule_svg(plan: PipelinePlan, problems: Sequence[str] = ()) -> str:
    """The Gantt chart as the content of an SVG file."""
    return gantt(plan.timeline, label=". ".join([f"Pipeline schedule: {headline(plan)}", *problems]), unit=UNIT)


def schedule_section(plan: PipelinePlan) -> str:
    """HTML: the chart and a table by rank, with the CSS classes of pages.report_page."""
    busy, total = plan.timeline.busy, plan.timeline.total
    rows = "".join(
        f"<tr><td>{rank}</td><td>{_layers(plan, rank)}</td><td>{(total - busy[rank]) / total:.1%}</td>"
        f"<td>{plan.live[rank]:g}</td><td>{plan.live_layers[rank]:g}</td></tr>"
        for rank in range(plan.pp)
    )
    head = (
        "<tr><th>pipeline rank</th><th>layers</th><th>idle, of the step</th><th>micro-batches held at most"
        f"{' (chunks)' if plan.vpp > 1 else ''}</th><th>layers of activations held</th></tr>"
    )
    paler = ", later chunks paler" if plan.vpp > 1 else ""
    return (
        '<figure class="chart wide"><h3>One step <span class="unit">forward blue, backward orange'
        f"{paler}; numbers are micro-batches</span></h3>{schedule_svg(plan)}"
        f"<figcaption>{headline(plan)}</figcaption></figure>"
        f'<div class="table"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(slot: Slot, vpp: int) -> str:
    letter = "F" if slot.direction is Pass.forward else "B"
    return f"{letter}{slot.chunk}.{slot.micro_batch}" if vpp > 1 else f"{letter}{slot.micro_batch}"


def _layers(plan: PipelinePlan, rank: int) -> str:
    """0-3, 8-11."""
    stages = plan.stage_layers[rank :: plan.pp]
    return ", ".join(f"{stage[0]}-{stage[-1]}" if len(stage) > 1 else str(stage[0]) for stage in stages)


WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1100.0, 64.0, 8.0, 8.0, 40.0
MAX_BARS = 3000
"""With more bars they are too thin to point at, and are drawn as one path for each row and colour to save bytes."""

GANTT_STYLE = (
    ".gantt text{font:12px system-ui,sans-serif;fill:currentColor}.gantt .bar-text{fill:#10202c;text-anchor:middle}"
    ".gantt .forward{fill:#56b4e9}.gantt .backward{fill:#e69f00}.gantt .rail{fill:currentColor;fill-opacity:.07}"
    ".gantt .tick{stroke:currentColor;stroke-opacity:.25}"
)


def gantt(timeline: Timeline, *, label: str, unit: str) -> str:
    """The step as <svg>.

    Args:
        label: description of the chart for screen readers.
        unit: of the timeline's numbers, written under the axis.
    """
    ranks = len(timeline.table)
    row = max(6.0, min(26.0, 520.0 / ranks))
    height = TOP + ranks * row + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / timeline.total
    every = max(1, round(14 / row))
    parts = [f"<title>{escape(label)}</title><style>{GANTT_STYLE}</style>"]
    is_detailed = sum(map(len, timeline.table)) <= MAX_BARS
    for rank in range(ranks):
        y = TOP + rank * row
        parts.append(
            f'<rect class="rail" x="{LEFT:g}" y="{y:.1f}" width="{timeline.total * scale:.1f}" height="{row - 2:.1f}"/>'
        )
        if rank % every == 0:
            parts.append(f'<text x="{LEFT - 8:g}" y="{y + row / 2 + 3:.1f}" text-anchor="end">rank {rank}</text>')
        parts.extend((_bars if is_detailed else _paths)(timeline, rank, y, row - 2, scale))
    parts.extend(_axis(timeline.total, scale, TOP + ranks * row, unit))
    return (
        f'<svg class="gantt" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _bars(timeline: Timeline, rank: int, y: float, height: float, scale: float) -> list[str]:
    parts = []
    chunks = 1 + max(slot.chunk for slot in timeline.table[rank])
    for slot, start, end in zip(timeline.table[rank], timeline.starts[rank], timeline.ends[rank], strict=True):
        x, width = LEFT + start * scale, max(0.5, (end - start) * scale - 0.8)
        area = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        words = f"{_words(slot, rank, chunks)}, from {start:.4g} to {end:.4g}"
        look = f'class="{slot.direction.value}" fill-opacity="{_opacity(slot, chunks)}"'
        parts.append(f"<rect {look} {area}><title>{words}</title></rect>")
        text = str(slot.micro_batch)
        if width >= 7 * len(text) + 3 and height >= 11:
            parts.append(f'<text class="bar-text" x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}">{text}</text>')
    return parts


def _paths(timeline: Timeline, rank: int, y: float, height: float, scale: float) -> list[str]:
    chunks = 1 + max(slot.chunk for slot in timeline.table[rank])
    paths: dict[tuple[Pass, str], list[str]] = {}
    for slot, start, end in zip(timeline.table[rank], timeline.starts[rank], timeline.ends[rank], strict=True):
        width = max(0.2, (end - start) * scale - 0.2)
        shape = f"M{LEFT + start * scale:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z"
        paths.setdefault((slot.direction, _opacity(slot, chunks)), []).append(shape)
    return [
        f'<path class="{direction.value}" fill-opacity="{opacity}" d="{"".join(shapes)}"/>'
        for (direction, opacity), shapes in paths.items()
    ]


def _axis(total: float, scale: float, y: float, unit: str) -> list[str]:
    step = nice_step(total / 10)
    parts = []
    for k in range(int(total / step) + 1):
        x = LEFT + k * step * scale
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:g}" y2="{y + 4:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{axis_number(k * step)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT:g}" y="{y + 34:.1f}" text-anchor="end">{escape(unit)}</text>')
    return parts


def _opacity(slot: Slot, chunks: int) -> str:
    """Opacity: 1 for the first chunk, 0.5 for the last."""
    return f"{1 - 0.5 * slot.chunk / max(1, chunks - 1):.2g}"


def _words(slot: Slot, rank: int, chunks: int) -> str:
    chunk = f", chunk {slot.chunk}" if chunks > 1 else ""
    return f"rank {rank}: {slot.direction.value} of micro-batch {slot.micro_batch}{chunk}"
