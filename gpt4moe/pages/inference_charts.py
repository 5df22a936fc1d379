"""The curves of a page of `plan.py serve`: each layout as its load grows, and at one load what it may turn out as.

InferencePlan.decode_curve, prefill_curve -> Series -> line charts
the load that the tables show             -> a bar from the least to the most, by the errors of published rows
"""

from collections.abc import Callable

from gpt4moe.pages.charts import Bar, Chart, Point, Series, line_chart
from gpt4moe.planner.inference import MILLION, Deployment, InferencePlan, decode_usd
from gpt4moe.planner.prefill import Prefill
from gpt4moe.planner.serving import Serving, usd_per_tokens
from gpt4moe.planner.serving_error import Quantity

Bars = dict[str, Bar | None]
"""Name of a layout -> its bar."""


def decode_charts(plan: InferencePlan) -> str:
    """HTML: new tokens, as more sequences are in flight."""
    cluster, limit = plan.served.cluster, {"inference.max_token_ms": plan.config.max_token_ms}
    curves = {name: (d.layout.copies, plan.decode_curve(d)) for name, d in plan.shown.items()}

    def chart(
        title: str, unit: str, value: Callable[[Serving], float], bars: Bars | None = None, **look: object
    ) -> Chart:
        lines = {
            name: [(float(load.sequences * copies), value(load)) for load in loads]
            for name, (copies, loads) in curves.items()
        }
        return _chart(plan, title, unit, lines, "sequences in flight", bars or {}, **look)

    def milliseconds(load: Serving) -> float:
        return 1e3 * load.latency_seconds

    def usd(load: Serving) -> float:
        return decode_usd(load, cluster) or 0.0

    faster = _bars(plan, lambda d: float(d.in_flight), lambda d: d.decode.tokens_per_second)
    timed = [
        chart("Time from a token to the next", "ms", milliseconds, levels=limit),
        chart("Throughput of all sequences", "new tokens/s", lambda load: load.tokens_per_second, faster),
    ]
    if cluster.usd_per_hour is None:
        return _drawn(timed)
    cheaper = _price_bars(plan, lambda d: float(d.in_flight), lambda d: usd(d.decode))
    traded = {name: [(milliseconds(load), usd(load)) for load in loads] for name, (_, loads) in curves.items()}
    at_token = _price_bars(plan, lambda d: milliseconds(d.decode), lambda d: usd(d.decode))
    return _drawn(
        [
            *timed,
            chart("Price of new tokens", "USD for a million", usd, cheaper, log_y=True),
            _chart(plan, "Price against time a token", "USD for a million", traded, "ms a token", at_token, log_y=True),
        ]
    )


def prefill_charts(plan: InferencePlan) -> str:
    """HTML: prompts, as more come at once."""

    def chart(
        title: str, unit: str, value: Callable[[Deployment, Prefill], float], bars: Bars, **look: object
    ) -> Chart:
        lines = {
            name: [(float(burst.prompts * d.layout.copies), value(d, burst)) for burst in plan.prefill_curve(d)]
            for name, d in plan.shown.items()
        }
        return _chart(plan, title, unit, lines, "prompts at once", bars, **look)

    def usd(deployment: Deployment, burst: Prefill) -> float:
        return burst_usd(plan, deployment, burst) or 0.0

    def first(d: Deployment) -> float:
        return float(d.layout.copies)

    later = _bars(plan, first, lambda d: d.prefill.first_token_seconds, Quantity.first_token)
    faster = _bars(plan, first, lambda d: d.prefill.tokens_per_second)
    timed = [
        chart("Time to the last prompt's first token", "s", lambda _, b: b.first_token_seconds, later, log_y=True),
        chart("Throughput of prompts", "prompt tokens/s", lambda _, burst: burst.tokens_per_second, faster),
    ]
    if plan.served.cluster.usd_per_hour is None:
        return _drawn(timed)
    cheaper = _price_bars(plan, first, lambda d: usd(d, d.prefill))
    return _drawn([*timed, chart("Price of prompts", "USD for a million", usd, cheaper, log_y=True)])


def burst_usd(plan: InferencePlan, deployment: Deployment, burst: Prefill) -> float | None:
    """USD for a million prompt tokens that come in such bursts; None: the cluster has no price."""
    return usd_per_tokens(MILLION, deployment.layout.devices, burst.tokens_per_second, plan.served.cluster)


def _bars(
    plan: InferencePlan,
    x: Callable[[Deployment], float],
    value: Callable[[Deployment], float],
    quantity: Quantity = Quantity.throughput,
) -> Bars:
    found: Bars = {}
    for name, d in plan.shown.items():
        interval = plan.interval(d, quantity)
        found[name] = None if interval is None else (x(d), *interval.around(value(d)))
    return found


def _price_bars(plan: InferencePlan, x: Callable[[Deployment], float], usd: Callable[[Deployment], float]) -> Bars:
    found: Bars = {}
    for name, d in plan.shown.items():
        interval = plan.interval(d, Quantity.throughput)
        found[name] = None if interval is None else (x(d), *interval.around_price(usd(d)))
    return found


def _drawn(charts: list[Chart]) -> str:
    return f'<div class="charts">{"".join(map(line_chart, charts))}</div>'


def _chart(
    plan: InferencePlan, title: str, unit: str, lines: dict[str, list[Point]], x: str, bars: Bars, **look: object
) -> Chart:
    series = [
        Series(name=_name(name, plan.shown[name]), points=points, bar=bars.get(name)) for name, points in lines.items()
    ]
    return Chart(title=title, unit=unit, series=series, x_name=x, log_x=True, first_colour=1, **look)  # type: ignore[arg-type]


def _name(name: str, deployment: Deployment) -> str:
    layout = deployment.layout
    return f"{name}: tp {layout.tp}, pp {layout.pp}, ep {deployment.ep}, copies {layout.copies}"
