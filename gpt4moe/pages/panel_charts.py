"""A dashboard's panels drawn from metrics.jsonl: Panel + records -> Chart. Metrics that the run lacks get no chart."""

from collections.abc import Mapping, Sequence

from gpt4moe.pages.charts import MAX_POINTS, MAX_WIDE_POINTS, Chart, Series
from gpt4moe.pages.curves import Curve, curve_of, smooth, smoothing_span, thin
from gpt4moe.runlog.dashboard import Panel, Scale
from gpt4moe.runlog.metrics_columns import MetricColumns

# A curve that spans more than this is drawn on a logarithmic axis (scale: auto), else one spike flattens all the rest.
WIDE_SPAN = 30.0
# With more points, a noisy curve gets a smoothed one over it; several noisy curves are replaced by smoothed ones.
NOISY_POINTS = 300
CALM = ("learning_rate", "dead_experts", "device_hours", "cost_usd", "peak_memory_bytes", "consumed_tokens")
# A metric with fewer points than this share of the steps is drawn as dots: it is not recorded every step.
SPARSE = 0.5


def panel_charts(
    panels: Sequence[Panel], columns: MetricColumns, *, levels: Mapping[str, float], marks: Mapping[str, float]
) -> list[Chart]:
    """Charts of the panels that have values, in order.

    Args:
        levels: name -> nats/token, lines across the chart of the loss.
        marks: name -> step, lines down every wide chart.
    """
    names = columns.names
    charts = []
    for panel in panels:
        curves = {name: curve_of(columns, name) for wanted in panel.metrics for name in _named(wanted, names)}
        curves = {name: curve for name, curve in curves.items() if len(curve)}
        if not curves:
            continue
        dense = _dense(curves, len(columns))
        series = _series(panel, curves, dense)
        note = ", smoothed" if len(dense) > 1 and _is_noisy(panel, curves) else ""
        charts.append(
            Chart(
                title=panel.title,
                unit=panel.unit.replace("/token", " per token") + note,
                series=series,
                levels=levels if "loss" in panel.metrics else {},
                marks=marks if panel.wide else {},
                log_y=_is_log(panel, curves),
                first_colour=0 if series[0].look == "raw" else 1,
                is_wide=panel.wide,
            )
        )
    return charts


def _named(wanted: str, names: Sequence[str]) -> list[str]:
    """The names in a record that match a panel's metric; layers in their order."""
    if wanted.endswith("/*"):
        return sorted(name for name in names if name.startswith(wanted[:-1]))
    return [name for name in names if name == wanted]


def _dense(curves: Mapping[str, Curve], num_steps: int) -> list[str]:
    return [name for name, curve in curves.items() if len(curve) >= SPARSE * num_steps or len(curve) > NOISY_POINTS]


def _is_noisy(panel: Panel, curves: Mapping[str, Curve]) -> bool:
    return panel.smooth or any(len(curve) > NOISY_POINTS and name not in CALM for name, curve in curves.items())


def _series(panel: Panel, curves: Mapping[str, Curve], dense: Sequence[str]) -> list[Series]:
    series = []
    for name, curve in curves.items():
        label = name.partition("/")[2] or name
        drawn = thin(curve, MAX_WIDE_POINTS if panel.wide else MAX_POINTS).points()
        if name not in dense:
            series.append(Series(name=label, points=drawn, look="dots"))
        elif not _is_noisy(panel, curves):
            series.append(Series(name=label, points=drawn))
        else:
            smoothed = smooth(curve, smoothing_span(len(curve)))
            if dense == [name]:
                series.append(Series(name=label, points=drawn, look="raw"))
                label += ", smoothed"
            few = thin(smoothed, MAX_WIDE_POINTS if panel.wide else MAX_POINTS)
            series.append(Series(name=label, points=few.points()))
    return series


def _is_log(panel: Panel, curves: Mapping[str, Curve]) -> bool:
    if panel.scale is Scale.auto:
        low, high = min(curve.y.min() for curve in curves.values()), max(curve.y.max() for curve in curves.values())
        return bool(low > 0 and high / low > WIDE_SPAN)
    return panel.scale is Scale.log
