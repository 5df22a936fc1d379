"""A pipeline's schedule for people: lines of text, records for JSON, and a section of a page with its Gantt chart."""

import json
from collections.abc import Sequence

from gpt4moe.pages.gantt import gantt
from gpt4moe.pipeline.schedule import Pass, Slot
from gpt4moe.planner.pipeline_plan import PipelinePlan

UNIT = "1 = forward pass of an average stage, by FLOP"


def schedule_text(plan: PipelinePlan, problems: Sequence[str] = ()) -> str:
    """A line a rank, slots in order: F3 is the forward pass of micro-batch 3, B1.3 the backward pass of chunk 1.

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
    """The Gantt chart, a file of its own."""
    return gantt(plan.timeline, label=". ".join([f"Pipeline schedule: {headline(plan)}", *problems]), unit=UNIT)


def schedule_section(plan: PipelinePlan) -> str:
    """HTML: the chart and a table by rank; classes of pages.report_page."""
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
