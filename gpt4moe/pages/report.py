"""report.html: the report of a run in one file, which opens offline, in a light or dark theme.

ReportData -> head line, verdict, cards -> the dashboard's panels, expert load -> samples -> starts, config -> one file
"""

import math
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from gpt4moe.pages.availability import availability_section, slowest_card
from gpt4moe.pages.charts import line_chart
from gpt4moe.pages.curves import curve_of, middle
from gpt4moe.pages.expert_maps import heat_map, load_maps
from gpt4moe.pages.panel_charts import panel_charts
from gpt4moe.pages.report_page import POLICY, SCRIPT, STYLE
from gpt4moe.pages.report_tables import WireCount, goodput_section, wire_table
from gpt4moe.pages.schedule_page import schedule_section
from gpt4moe.planner.pipeline_plan import PipelinePlan
from gpt4moe.runlog.console import clock_time, short_count
from gpt4moe.runlog.dashboard import PanelSection, read_dashboard
from gpt4moe.runlog.expert_load import ExpertLoad, LoadWindow
from gpt4moe.runlog.goodput import Goodput
from gpt4moe.runlog.interruptions import Interruption
from gpt4moe.runlog.metrics_columns import MetricColumns
from gpt4moe.runlog.run_files import replace_file
from gpt4moe.runlog.step_lines import SAMPLES_FILE, StepLine

EXPERTS = "Experts"
"""The dashboard section that gets the heat maps."""
MOST_TEXTS = 12
"""Of one prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """One launch of the run: the first, or a resume."""

    first_step: int
    """The first step of this launch."""
    when: str
    """Date and time, formatted for readers."""
    layout: str
    note: str = ""
    """What changed since the previous launch, e.g. config keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Text that the trained model wrote."""

    prompt: str
    text: str
    """The text after the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything that a report shows, as plain values. None and empty values are left out."""

    run_name: str
    layout: str
    """One line, e.g. "tp=2 pp=2 ep=2, 4 ranks"."""
    columns: MetricColumns
    """metrics.jsonl."""
    resolved_config: str
    """The config of the run, as YAML."""
    checkpoint_path: str
    num_parameters: int | None = None
    num_active_parameters: int | None = None
    """Number of parameters that one token uses."""
    unigram_entropy: float | None = None
    """Entropy of the corpus, nats/token."""
    bigram_entropy: float | None = None
    expert_load: ExpertLoad | None = None
    load_windows: Sequence[LoadWindow] = ()
    pipeline: PipelinePlan | None = None
    """Schedule of the last launch; None without a pipeline."""
    wire: WireCount | None = None
    account: Goodput | None = None
    interruptions: Sequence[Interruption] = ()
    starts: Sequence[RunStart] = ()
    sections: Sequence[PanelSection] = field(default_factory=lambda: read_dashboard().sections)
    alerts: Sequence[tuple[int, str, str]] = ()
    """(step, name, text) of every alert that fired while training."""
    results: Sequence[Sequence[str]] = ()
    """A table of exact match, its head first."""
    samples: Sequence[Sample] = ()
    sheets: Sequence[tuple[str, bytes]] = ()
    """(what it shows, PNG) of pictures that a demo drew."""
    texts: Sequence[StepLine] = ()
    """Of samples.jsonl: what the model wrote while it trained."""
    facts: dict[str, str] = field(default_factory=dict)
    """Further cards: title -> text."""

    def levels(self) -> dict[str, float]:
        """Name -> nats/token: the entropies that the loss is compared with."""
        entropies = {"unigram entropy": self.unigram_entropy, "bigram entropy": self.bigram_entropy}
        return {name: value for name, value in entropies.items() if value is not None}


def write_report(path: Path | str, data: ReportData) -> None:
    """Writes the report with an atomic rename: a reader sees the old or the new report, never a part."""
    title = escape(data.run_name)
    body = "\n".join(
        part
        for part in (
            f'<h1>{title}</h1><p class="under-title">{_under_title(data)}</p>',
            _verdict(data),
            f'<dl class="cards">{_cards(data)}</dl>',
            _section("Alerts", _alerts(data.alerts)),
            *(_section(section.title, _panels(section, data)) for section in data.sections),
            _section("Pipeline schedule", schedule_section(data.pipeline) if data.pipeline else ""),
            _section("Bytes on the wire", wire_table(data.wire) if data.wire else ""),
            _section("Exact match", _results(data.results)),
            _section("Samples", "".join(map(_sample, data.samples))),
            _section("What it sees", "".join(map(_sheet, data.sheets))),
            _section("Samples while training", _texts(data.texts)),
            _section("Where the time went", goodput_section(data.account) if data.account else ""),
            _section("Availability", availability_section(data.account, data.interruptions) if data.account else ""),
            _section("Starts", _starts(data.starts)),
            _section("Checkpoint", f"<p><code>{_text(data.checkpoint_path)}</code></p>"),
            _section(
                "Configuration",
                f"<details><summary>resolved.yaml</summary><pre>{_text(data.resolved_config)}</pre></details>",
            ),
        )
        if part
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: training report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    # replace: a sample may end with half a character, which UTF-8 cannot encode.
    replace_file(Path(path), page.encode("utf-8", errors="replace"))


def _under_title(data: ReportData) -> str:
    step = data.columns.last("step")
    parts = ["no step yet" if step is None else f"{step:,.0f} steps", data.layout]
    return escape(" · ".join(part for part in parts if part))


def _verdict(data: ReportData) -> str:
    """One sentence that compares the held-out loss with the unigram and bigram entropies."""
    loss = data.columns.last("eval_loss")
    if loss is None or not math.isfinite(loss) or not data.levels():
        return ""
    gaps = []
    for name, entropy in data.levels().items():
        side, look = ("below", "good") if loss < entropy else ("above", "bad")
        gaps.append(f'<b class="{look}">{abs(entropy - loss):.2f} {side}</b> the {name} ({entropy:.2f})')
    return f'<p class="verdict">Held-out loss <b>{loss:.3f}</b> nats per token: {" and ".join(gaps)}.</p>'


def _cards(data: ReportData) -> str:
    loss, held_out, tokens = map(data.columns.last, ("loss", "eval_loss", "consumed_tokens"))
    speed = middle(curve_of(data.columns, "tokens_per_second").y)
    utilization = middle(curve_of(data.columns, "mfu").y)
    cost, hours = map(data.columns.last, ("cost_usd", "device_hours"))
    best = min(curve_of(data.columns, "eval_loss").y, default=None)
    cards = [
        ("Training loss", f"{loss:.3f}", "last step, nats per token") if loss is not None else None,
        ("Held-out loss", f"{held_out:.3f}", f"best {best:.3f}") if held_out is not None and best is not None else None,
        ("Tokens", short_count(tokens), f"{tokens:,.0f}") if tokens is not None else None,
        ("Speed", f"{short_count(speed)}/s", "tokens per second, median step") if speed is not None else None,
        ("MFU", f"{utilization:.1%}", "of the devices' dense peak, median step") if utilization is not None else None,
        ("Cost", f"${cost:,.2f}", f"{hours:,.3g} device hours") if cost is not None else None,
        _duration_card(data),
        slowest_card(data.columns),
        _parameter_card(data),
    ]
    texts = {"Layout": data.layout} | data.facts
    return "".join(
        f'<div class="card"><dt>{title}</dt><dd>{value}<small>{small}</small></dd></div>'
        for title, value, small in (card for card in cards if card)
    ) + "".join(
        f'<div class="card"><dt>{_text(title)}</dt><dd class="text">{_text(value)}</dd></div>'
        for title, value in texts.items()
    )


def _duration_card(data: ReportData) -> tuple[str, str, str] | None:
    """Wall time of the run, as goodput counts it. For a run without events: the sum of its steps."""
    if data.account is not None:
        return "Duration", clock_time(data.account.wall_seconds), "h:mm:ss of wall time, restarts included"
    seconds = sum(curve_of(data.columns, "step_seconds").y.tolist())
    return ("Duration", clock_time(seconds), "h:mm:ss of steps") if seconds else None


def _parameter_card(data: ReportData) -> tuple[str, str, str] | None:
    if data.num_parameters is None:
        return None
    active = data.num_active_parameters
    return "Parameters", short_count(data.num_parameters), f"{short_count(active)} for each token" if active else ""


def _marks(starts: Sequence[RunStart]) -> dict[str, float]:
    return {"resume" if i == 1 else f"resume {i}": start.first_step for i, start in enumerate(starts[1:], start=1)}


def _panels(section: PanelSection, data: ReportData) -> str:
    charts = panel_charts(section.panels, data.columns, levels=data.levels(), marks=_marks(data.starts))
    maps = ""
    if section.title == EXPERTS and data.expert_load:
        maps = heat_map(data.expert_load) + load_maps(data.load_windows, data.expert_load.layers)
    return f'<div class="charts">{maps}{"".join(map(line_chart, charts))}</div>'


def _sample(sample: Sample) -> str:
    return (
        f'<div class="sample"><pre><span class="prompt">{_text(sample.prompt)}</span>{_text(sample.text)}</pre></div>'
    )


def _sheet(sheet: tuple[str, bytes]) -> str:
    said, png = sheet
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    return f'<p>{_text(said)}</p><div class="table"><img src="{source}" alt="{_text(said)}"></div>'


def _texts(lines: Sequence[StepLine]) -> str:
    """A table for each prompt: its text at each step, at some of many."""
    of_prompts: dict[str, list[StepLine]] = {}
    for line in lines:
        of_prompts.setdefault(line["prompt"], []).append(line)
    tables = []
    for prompt, all_lines in of_prompts.items():
        shown = _spread(all_lines, MOST_TEXTS)
        rows = "".join(f"<tr><td>{it['step']:,}</td><td><pre>{_text(it['text'])}</pre></td></tr>" for it in shown)
        rest = (
            "" if len(shown) == len(all_lines) else f" ({len(shown)} of {len(all_lines)} texts; {SAMPLES_FILE} has all)"
        )
        head = f'<tr><th>step</th><th><pre class="prompt">{_text(prompt) or "(a new text)"}</pre>{rest}</th></tr>'
        tables.append(f'<div class="table texts"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>')
    return "".join(tables)


def _spread(lines: Sequence[StepLine], most: int) -> list[StepLine]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(at * (len(lines) - 1) / (most - 1))] for at in range(most)]


def _alerts(alerts: Sequence[tuple[int, str, str]]) -> str:
    if not alerts:
        return ""
    rows = "".join(
        f"<tr><td>{step:,}</td><td>{_text(name)}</td><td>{_text(text)}</td></tr>" for step, name, text in alerts
    )
    head = "<tr><th>after step</th><th>alert</th><th>what it saw</th></tr>"
    return f'<div class="table"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _starts(starts: Sequence[RunStart]) -> str:
    if not starts:
        return ""
    rows = "".join(
        f"<tr><td>{number}</td><td>{'start' if number == 1 else 'resume'}, step {start.first_step:,}</td>"
        f"<td>{_text(start.when)}</td><td>{_text(start.layout)}</td><td>{_text(start.note)}</td></tr>"
        for number, start in enumerate(starts, start=1)
    )
    head = "<tr><th>#</th><th>from</th><th>when</th><th>layout</th><th>changed</th></tr>"
    return f'<div class="table"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _results(rows: Sequence[Sequence[str]]) -> str:
    cells = (("th" if number == 0 else "td", row) for number, row in enumerate(rows))
    lines = "".join(f"<tr>{''.join(f'<{tag}>{_text(it)}</{tag}>' for it in row)}</tr>" for tag, row in cells)
    return f'<div class="table"><table>{lines}</table></div>' if rows else ""


def _section(title: str, content: str) -> str:
    is_empty = not re.sub(r"<[^>]*>", "", content)
    return "" if is_empty else f"<section><h2>{title}</h2>{content}</section>"


def _text(text: str) -> str:
    """Text escaped for HTML. Control characters, which HTML forbids, are made visible."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text))
