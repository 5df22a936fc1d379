"""The answer of `plan.py serve`: what a deployment costs, as tables, JSON or a page with curves.

planner.inference.InferencePlan -> rows of text -> tables (rich), a page
                                -> curves over the load -> JSON, line charts
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from gpt4moe.pages.inference_charts import burst_usd, decode_charts, prefill_charts
from gpt4moe.pages.plan_page import known_text, section, with_range, write_page
from gpt4moe.planner.efficiency import ErrorInterval
from gpt4moe.planner.inference import OBJECTIVES, Deployment, InferencePlan, decode_usd
from gpt4moe.planner.serving_error import Quantity, served_kind

Column = Callable[[InferencePlan, Deployment], str]


def _timed(quantity: Quantity, number: Callable[[Deployment], float], form: str = ",.3g") -> Column:
    """A number, with what it may turn out as where rows are known."""

    def text(plan: InferencePlan, d: Deployment) -> str:
        interval, value = plan.interval(d, quantity), number(d)
        return with_range(f"{value:{form}}", None if interval is None else interval.around(value), form)

    return text


def _priced(number: Callable[[Deployment], float | None], form: str) -> Column:
    """A price, which grows as throughput falls."""

    def text(plan: InferencePlan, d: Deployment) -> str:
        interval, usd = plan.interval(d, Quantity.throughput), number(d)
        likely = None if interval is None or usd is None else interval.around_price(usd)
        return with_range(known_text(usd, form), likely, form)

    return text


LOAD: dict[str, Column] = {
    "tp": lambda _, d: str(d.layout.tp),
    "pp": lambda _, d: str(d.layout.pp),
    "ep": lambda _, d: str(d.ep),
    "copies": lambda _, d: str(d.layout.copies),
    "in flight [seq]": lambda _, d: f"{d.in_flight:,}",
    "that fit [seq]": lambda _, d: f"{d.most * d.layout.copies:,}",
    "weights [GB]": lambda _, d: f"{d.decode.weight_bytes / 1e9:.1f}",
    "cache [GB]": lambda _, d: f"{d.decode.cache_bytes / 1e9:.1f}",
    "first token [s]": _timed(Quantity.first_token, lambda d: d.prefill.first_token_seconds),
    "a token [ms]": lambda _, d: f"{1e3 * d.decode.latency_seconds:.3g}",
    "with prompts [ms]": _timed(Quantity.token, lambda d: 1e3 * d.token_with_prompts_seconds),
}
PRICES: dict[str, Column] = {
    "prompt [tokens/s]": _timed(Quantity.throughput, lambda d: d.prefill.steady_tokens_per_second, ",.0f"),
    "new [tokens/s]": _timed(Quantity.throughput, lambda d: d.decode.tokens_per_second, ",.0f"),
    "requests/s": _timed(Quantity.throughput, lambda d: d.requests_per_second),
    "prompt [USD/M]": _priced(lambda d: d.input_usd, ",.2f"),
    "new [USD/M]": _priced(lambda d: d.output_usd, ",.2f"),
    "request [USD]": _priced(lambda d: d.request_usd, ".3g"),
}
"""Column -> its text for one layout."""
TABLES = {"Layouts under their load": LOAD, "Throughput and price": PRICES}
QUANTITIES = {
    Quantity.throughput: "throughput and prices",
    Quantity.first_token: "time to the first token",
    Quantity.token: "time a token, with prompts",
}


def inference_tables(plan: InferencePlan) -> list[Table | str]:
    """The layouts side by side, the asked and the best one as their load grows, and what was assumed."""
    return [
        _heading(plan),
        *(_table(title, ["", *columns], _rows(plan, columns)) for title, columns in TABLES.items()),
        *(f"in brackets: {line}" for line in _ranges(plan)),
        _verdict(plan),
        *(_table(title, head, loads) for title, (head, *loads) in _curves(plan).items()),
        "assumptions:",
        *(f"- {one}" for one in plan.assumptions),
    ]


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
        + "".join(
            section(title, _html_table(["", *columns], _rows(plan, columns))) for title, columns in TABLES.items()
        )
        + "".join(f"<p>In brackets, and as bars: {escape(line)}</p>" for line in _ranges(plan))
        + section("New tokens, as more sequences are in flight", decode_charts(plan))
        + section("Prompts, as more come at once", prefill_charts(plan))
        + "".join(section(title, _html_table(head, loads)) for title, (head, *loads) in _curves(plan).items())
        + section("Assumptions", f"<ul>{assumed}</ul>")
    )
    write_page(path, title, body)


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


def _rows(plan: InferencePlan, columns: Mapping[str, Column]) -> list[list[str]]:
    return [[name, *(text(plan, d) for text in columns.values())] for name, d in plan.shown.items()]


def _ranges(plan: InferencePlan) -> list[str]:
    """Of which published rows the ranges are; one line for each kind of deployment and quantity."""
    lines = []
    for quantity, words in QUANTITIES.items():
        for d in plan.shown.values():
            interval = plan.interval(d, quantity)
            if interval is None:
                kind = served_kind(plan.served, d.layout).value
                hardware = plan.served.cluster.generation.value
                line = f"{words}: no range, as no published row of {kind} on {hardware} is known"
            else:
                line = (
                    f"{words}: by {interval.rows} published rows ({interval.of}), predicted {interval.least:+.0%} to "
                    f"{interval.most:+.0%} off"
                )
            lines.append(line)
    return list(dict.fromkeys(lines))


def _curves(plan: InferencePlan) -> dict[str, list[list[str]]]:
    """Title -> head and rows: new tokens and prompts of the asked and of the best layout as the load grows."""
    found = {}
    for name, d in plan.shown.items():
        if name in ("asked", "best 1") and (name == "asked" or d.layout != plan.asked.layout):
            found[f"{name}, new tokens as more sequences are in flight"] = _growth(plan, d)
            found[f"{name}, prompts as more come at once"] = _bursts(plan, d)
    return found


def _growth(plan: InferencePlan, deployment: Deployment) -> list[list[str]]:
    cluster, copies = plan.served.cluster, deployment.layout.copies
    head = ["in flight [seq]", "a token [ms]", "new [tokens/s]", "new [USD/M]", "cache [GB]"]
    return [head] + [
        [f"{load.sequences * copies:,}", f"{1e3 * load.latency_seconds:.3g}", f"{load.tokens_per_second:,.0f}",
         known_text(decode_usd(load, cluster), ",.2f"), f"{load.cache_bytes / 1e9:.2f}"]
        for load in plan.decode_curve(deployment)
    ]  # fmt: skip


def _bursts(plan: InferencePlan, deployment: Deployment) -> list[list[str]]:
    head = ["prompts at once", "the last first token [s]", "prompt [tokens/s]", "prompt [USD/M]"]
    return [head] + [
        [f"{burst.prompts * deployment.layout.copies:,}", f"{burst.first_token_seconds:.3g}",
         f"{burst.tokens_per_second:,.0f}",
         known_text(burst_usd(plan, deployment, burst), ",.2f")]
        for burst in plan.prefill_curve(deployment)
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
        "token_with_prompts_seconds": deployment.token_with_prompts_seconds,
        "prompt_tokens_per_second": deployment.prefill.steady_tokens_per_second,
        "new_tokens_per_second": deployment.decode.tokens_per_second,
        "usd_per_million_prompt_tokens": deployment.input_usd, "usd_per_million_new_tokens": deployment.output_usd,
        "usd_per_request": deployment.request_usd, "requests_per_second": deployment.requests_per_second,
        "intervals": {quantity.value: _interval_json(plan.interval(deployment, quantity)) for quantity in Quantity},
        "weight_bytes": deployment.decode.weight_bytes, "cache_bytes": deployment.decode.cache_bytes,
        "decode_curve": [
            {"in_flight": load.sequences * layout.copies, "token_seconds": load.latency_seconds,
             "new_tokens_per_second": load.tokens_per_second, "usd_per_million_new_tokens": decode_usd(load, cluster)}
            for load in plan.decode_curve(deployment)
        ],
        "prefill_curve": [
            {"prompts": burst.prompts * layout.copies, "first_token_seconds": burst.first_token_seconds,
             "prompt_tokens_per_second": burst.tokens_per_second,
             "usd_per_million_prompt_tokens": burst_usd(plan, deployment, burst)}
            for burst in plan.prefill_curve(deployment)
        ],
    }  # fmt: skip


def _interval_json(interval: ErrorInterval | None) -> dict[str, object] | None:
    """Signed errors of published rows; null: none is known."""
    return None if interval is None else asdict(interval)
