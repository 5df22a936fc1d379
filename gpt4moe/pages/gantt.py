"""A pipeline step as a Gantt chart: inline SVG, the same bytes for the same timeline, no script and no link.

    Timeline -> a row for each rank, a bar for each slot -> <svg>

Forward passes are blue, backward passes orange (Okabe and Ito's colours, told apart by every kind of eye and in grey),
a later chunk of a rank paler; a bar says its micro-batch where it has room, and all of it under the pointer.
"""

from html import escape

from gpt4moe.pages.charts import axis_number, nice_step
from gpt4moe.pipeline.schedule import Pass, Slot, Timeline

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1100.0, 64.0, 8.0, 8.0, 40.0
MAX_BARS = 3000
"""From here on bars are too thin to point at: one path a row and colour, a twentieth of the bytes."""

STYLE = (
    ".gantt text{font:12px system-ui,sans-serif;fill:currentColor}.gantt .bar-text{fill:#10202c;text-anchor:middle}"
    ".gantt .forward{fill:#56b4e9}.gantt .backward{fill:#e69f00}.gantt .rail{fill:currentColor;fill-opacity:.07}"
    ".gantt .tick{stroke:currentColor;stroke-opacity:.25}"
)


def gantt(timeline: Timeline, *, label: str, unit: str) -> str:
    """The step as <svg>.

    Args:
        label: what is drawn, for those who hear the page.
        unit: of the timeline's numbers, written under the axis.
    """
    ranks = len(timeline.table)
    row = max(6.0, min(26.0, 520.0 / ranks))
    height = TOP + ranks * row + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / timeline.total
    every = max(1, round(14 / row))
    parts = [f"<title>{escape(label)}</title><style>{STYLE}</style>"]
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
    """The first chunk in full colour, the last in half."""
    return f"{1 - 0.5 * slot.chunk / max(1, chunks - 1):.2g}"


def _words(slot: Slot, rank: int, chunks: int) -> str:
    chunk = f", chunk {slot.chunk}" if chunks > 1 else ""
    return f"rank {rank}: {slot.direction.value} of micro-batch {slot.micro_batch}{chunk}"
