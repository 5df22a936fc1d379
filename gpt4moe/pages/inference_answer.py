"""The answer of report=inference: what a deployment costs, as tables, JSON or a page with curves.

planner.inference.InferencePlan -> rows of text -> tables (rich), a page
                                -> curves over the load -> JSON, line charts
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from gpt4moe.pages.charts import Chart, Point, Series, line_chart
from gpt4moe.pages.plan_page import section, usd_text, write_page
from gpt4moe.planner.inference import MILLION, OBJECTIVES, Deployment, InferencePlan, decode_usd
from gpt4moe.planner.prefill import Prefill
from gpt4moe.planner.serving import Serving, usd_per_tokens

COLUMNS: dict[str, Callable[[Deployment], str]] = {
    "tp": lambda d: str(d.layout.tp),
    "pp": lambda d: str(d.layout.pp),
    "ep": lambda d: str(d.ep),
    "copies": lambda d: str(d.layout.copies),
    "in flight [seq]": lambda d: f"{d.in_flight:,}",
    "that fit [seq]": lambda d: f"{d.most * d.layout.copies:,}",
    "first token [s]": lambda d: f"{d.prefill.first_token_seconds:.3g}",
    "a token [ms]": lambda d: f"{1e3 * d.decode.latency_seconds:.3g}",
    "prompt [tokens/s]": lambda d: f"{d.prefill.steady_tokens_per_second:,.0f}",
    "new [tokens/s]": lambda d: f"{d.decode.tokens_per_second:,.0f}",
    "prompt [USD/M]": lambda d: usd_text(d.input_usd, ",.2f", missing="not known"),
    "new [USD/M]": lambda d: usd_text(d.output_usd, ",.2f", missing="not known"),
    "request [USD]": lambda d: usd_text(d.request_usd, ".3g", missing="not known"),
    "requests/s": lambda d: f"{d.requests_per_second:.3g}",
    "weights [GB]": lambda d: f"{d.decode.weight_bytes / 1e9:.1f}",
    "cache [GB]": lambda d: f"{d.decode.cache_bytes / 1e9:.1f}",
}
"""Column -> its text for one layout."""


def inference_tables(plan: InferencePlan) -> list[Table | str]:
    """The layouts side by side, the asked one as its load grows, and what was assumed."""
    table = _table("Layouts under their load", ["", *COLUMNS], _rows(plan))
    head, *loads = _growth(plan, plan.asked)
    growth = _table("The asked layout as the load grows", head, loads)
    return [_heading(plan), table, _verdict(plan), growth, "assumptions:", *(f"- {one}" for one in plan.assumptions)]


def inference_json(plan: InferencePlan) -> dict[str, object]:
    """Every number of the tables and curves. Seconds, bytes, tokens, USD."""
    config = {key: getattr(value, "value", value) for key, value in asdict(plan.config).items()}
    return {
        "model": plan.served.model.name, "cluster": plan.served.cluster.name, "gpus": plan.asked.layout.devices,
        "inference": config, "legal": plan.legal, "fit": plan.fit, "objective": OBJECTIVES[plan.config.objective][0],
        "layouts": {name: _json(plan, deployment) for name, deployment in plan.shown.items()},
        "assumptions": plan.assumptions,
    }  # fmt: skip


def write_inference_page(path: Path | str, plan: InferencePlan) -> None:
    """Writes the page with an atomic rename."""
    title = f"{plan.served.model.name}: inference"
    assumed = "".join(f"<li>{escape(one)}</li>" for one in plan.assumptions)
    body = (
        f'<h1>{escape(title)}</h1><p class="under-title">{escape(_heading(plan))}</p>'
        f'<p class="verdict">{escape(_verdict(plan))}</p>'
        + section("Layouts under their load", _html_table(["", *COLUMNS], _rows(plan)))
        + section("New tokens, as more sequences are in flight", _drawn(_decode_charts(plan)))
        + section("Prompts, as more come at once", _drawn(_prefill_charts(plan)))
        + section("Assumptions", f"<ul>{assumed}</ul>")
    )
    write_page(path, title, body)


def _drawn(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(map(line_chart, charts))}</div>'


def _heading(plan: InferencePlan) -> str:
    config, served = plan.config, plan.served
    return (
        f"{served.model.name} on {plan.asked.layout.devices} x {served.cluster.name}, {config.precision.value}: "
        f"requests of {config.prompt_tokens:,} prompt and {config.new_tokens:,} new tokens, at most "
        f"{config.max_token_ms:g} ms from a token to the next"
    )


def _verdict(plan: InferencePlan) -> str:
    best_by, late = OBJECTIVES[plan.config.objective][0], 1e3 * plan.asked.decode.latency_seconds
    counts = f"{plan.legal} layouts can be cut, {plan.fit} of them fit and keep the time a token"
    if late > plan.config.max_token_ms:
        counts += f"; the asked one does not: {late:.3g} ms"
    if not plan.best:
        return f"{counts}. Raise inference.max_token_ms, or take faster devices."
    return f"{counts}. Best by the least {best_by} (inference.objective={plan.config.objective.value})."


def _rows(plan: InferencePlan) -> list[list[str]]:
    return [[name, *(text(d) for text in COLUMNS.values())] for name, d in plan.shown.items()]


def _growth(plan: InferencePlan, deployment: Deployment) -> list[list[str]]:
    """Head and rows: one row for each load of the curve."""
    cluster, copies = plan.served.cluster, deployment.layout.copies
    head = ["in flight [seq]", "a token [ms]", "new [tokens/s]", "new [USD/M]", "cache [GB]"]
    return [head] + [
        [f"{load.sequences * copies:,}", f"{1e3 * load.latency_seconds:.3g}", f"{load.tokens_per_second:,.0f}",
         usd_text(decode_usd(load, cluster), ",.2f", missing="not known"), f"{load.cache_bytes / 1e9:.2f}"]
        for load in plan.decode_curve(deployment)
    ]  # fmt: skip


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(head):
        table.add_column(Text(column), justify="right" if index else "left")  # Text: rich reads "[s]" as markup
    for row in rows:
        table.add_row(*row)
    return table


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _json(plan: InferencePlan, deployment: Deployment) -> dict[str, object]:
    layout, cluster = deployment.layout, plan.served.cluster
    return {
        "tp": layout.tp, "pp": layout.pp, "ep": deployment.ep, "copies": layout.copies,
        "in_flight": deployment.in_flight,
        "most_in_flight": deployment.most * layout.copies,
        "first_token_seconds": deployment.prefill.first_token_seconds,
        "token_seconds": deployment.decode.latency_seconds,
        "prompt_tokens_per_second": deployment.prefill.steady_tokens_per_second,
        "new_tokens_per_second": deployment.decode.tokens_per_second,
        "usd_per_million_prompt_tokens": deployment.input_usd, "usd_per_million_new_tokens": deployment.output_usd,
        "usd_per_request": deployment.request_usd, "requests_per_second": deployment.requests_per_second,
        "weight_bytes": deployment.decode.weight_bytes, "cache_bytes": deployment.decode.cache_bytes,
        "decode_curve": [
            {"in_flight": load.sequences * layout.copies, "token_seconds": load.latency_seconds,
             "new_tokens_per_second": load.tokens_per_second, "usd_per_million_new_tokens": decode_usd(load, cluster)}
            for load in plan.decode_curve(deployment)
        ],
        "prefill_curve": [
            {"prompts": burst.prompts * layout.copies, "first_token_seconds": burst.first_token_seconds,
             "prompt_tokens_per_second": burst.tokens_per_second,
             "usd_per_million_prompt_tokens": _burst_usd(plan, deployment, burst)}
            for burst in plan.prefill_curve(deployment)
        ],
    }  # fmt: skip


def _burst_usd(plan: InferencePlan, deployment: Deployment, burst: Prefill) -> float | None:
    return usd_per_tokens(MILLION, deployment.layout.devices, burst.tokens_per_second, plan.served.cluster)


def _decode_charts(plan: InferencePlan) -> list[Chart]:
    cluster, limit = plan.served.cluster, {"inference.max_token_ms": plan.config.max_token_ms}
    curves = {name: (d.layout.copies, plan.decode_curve(d)) for name, d in plan.shown.items()}

    def chart(title: str, unit: str, value: Callable[[Serving], float], **look: object) -> Chart:
        lines = {
            name: [(float(load.sequences * copies), value(load)) for load in loads]
            for name, (copies, loads) in curves.items()
        }
        return _chart(plan, title, unit, lines, "sequences in flight", **look)

    def milliseconds(load: Serving) -> float:
        return 1e3 * load.latency_seconds

    def usd(load: Serving) -> float:
        return decode_usd(load, cluster) or 0.0

    timed = [
        chart("Time from a token to the next", "ms", milliseconds, levels=limit),
        chart("Throughput of all sequences", "new tokens/s", lambda load: load.tokens_per_second),
    ]
    if cluster.usd_per_hour is None:
        return timed
    traded = {name: [(milliseconds(load), usd(load)) for load in loads] for name, (_, loads) in curves.items()}
    return timed + [
        chart("Price of new tokens", "USD for a million", usd, log_y=True),
        _chart(plan, "Price against time a token", "USD for a million", traded, "ms a token", log_y=True),
    ]


def _prefill_charts(plan: InferencePlan) -> list[Chart]:
    def chart(title: str, unit: str, value: Callable[[Deployment, Prefill], float], **look: object) -> Chart:
        lines = {
            name: [(float(burst.prompts * d.layout.copies), value(d, burst)) for burst in plan.prefill_curve(d)]
            for name, d in plan.shown.items()
        }
        return _chart(plan, title, unit, lines, "prompts at once", **look)

    def usd(deployment: Deployment, burst: Prefill) -> float:
        return _burst_usd(plan, deployment, burst) or 0.0

    timed = [
        chart("Time to the last prompt's first token", "s", lambda _, burst: burst.first_token_seconds, log_y=True),
        chart("Throughput of prompts", "prompt tokens/s", lambda _, burst: burst.tokens_per_second),
    ]
    priced = plan.served.cluster.usd_per_hour is not None
    return timed + ([chart("Price of prompts", "USD for a million", usd, log_y=True)] if priced else [])


def _chart(plan: InferencePlan, title: str, unit: str, lines: dict[str, list[Point]], x: str, **look: object) -> Chart:
    series = [Series(name=_name(name, plan.shown[name]), points=points) for name, points in lines.items()]
    return Chart(title=title, unit=unit, series=series, x_name=x, log_x=True, first_colour=1, **look)  # type: ignore[arg-type]


def _name(name: str, deployment: Deployment) -> str:
    layout = deployment.layout
    return f"{name}: tp {layout.tp}, pp {layout.pp}, ep {deployment.ep}, copies {layout.copies}"
