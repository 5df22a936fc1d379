"""Alerts fire on what they are for, on planted series, and on nothing else."""

import math

import pytest

from gpt4moe.runlog.alerts import ALERT_RULES, Alert, AlertWatch, failing_alerts
from gpt4moe.runlog.dashboard import read_dashboard
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.waits import Idle
from tests.runlog.synthetic import falling_loss

STEPS = 400
SHIPPED = read_dashboard().alerts


def healthy(num_steps: int = STEPS) -> list[Record]:
    """A noisy, falling run: its speed and norm waver by a tenth, an expert is empty now and then."""
    records = falling_loss(num_steps)
    for record in records:
        step = record["step"]
        record["tokens_per_second"] = 8000.0 * (1 + 0.1 * math.sin(3.7 * step))
        record["grad_norm"] = 1.0 + 0.1 * math.cos(2.3 * step)
        record["dead_experts"] = int(step % 7 == 0)
    return records


def told(records: list[Record]) -> list[tuple[int, str]]:
    """(step, name) of every alert."""
    watch = AlertWatch(SHIPPED)
    return [(int(record["step"]), alert.name) for record in records for alert in watch.step(record)]


def changed(metric: str, first: int, factor: float, last: int = STEPS) -> list[Record]:
    records = healthy()
    for record in records[first - 1 : last]:
        record[metric] = record[metric] * factor
    return records


def test_a_healthy_run_is_left_alone() -> None:
    assert told(healthy()) == []


def test_the_shipped_alerts_use_every_rule() -> None:
    assert {type(alert.rule) for alert in SHIPPED} == set(ALERT_RULES.values())


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
def test_one_spike_is_told_once(metric: str) -> None:
    name = {"loss": "loss spike", "grad_norm": "gradient norm spike"}[metric]
    assert told(changed(metric, 300, 5.0, last=301)) == [(300, name)]


def test_a_loss_that_is_no_number_is_told_at_once() -> None:
    records = healthy(3)
    records[1]["loss"] = math.nan
    assert told(records) == [(2, "loss spike")]


def test_experts_that_stay_dead_are_told_after_50_steps_and_again_when_they_died_again() -> None:
    records = healthy()
    for record in records[100:160] + records[200:260]:
        record["dead_experts"] = 2
    assert told(records) == [(150, "dead experts"), (250, "dead experts")]


def test_a_lasting_drop_of_throughput_is_told_and_a_short_one_is_not() -> None:
    assert [name for _, name in told(changed("tokens_per_second", 200, 0.5))] == ["throughput drop"]
    assert told(changed("tokens_per_second", 200, 0.5, last=203)) == []
    assert told(changed("tokens_per_second", 200, 0.85)) == []


def test_a_loss_that_no_longer_falls_is_told() -> None:
    flat: list[Record] = [{"step": step, "loss": 3.0 + 0.01 * math.sin(17.0 * step)} for step in range(1, 2101)]
    assert told([dict(record, loss=record["loss"] - 1e-4 * record["step"]) for record in flat]) == []
    assert [
        name for _, name in told([dict(record, loss=record["loss"] + 1e-5 * record["step"]) for record in flat])
    ] == ["loss does not fall"]


def test_no_step_for_long_is_told_once_until_a_step_comes() -> None:
    watch = AlertWatch(SHIPPED, healthy(20))  # half a second each
    assert watch.idle(Idle(199.0)) == []
    (first,) = watch.idle(Idle(201.0))
    assert first.name == "no progress" and "0:03:21" in first.text
    assert watch.idle(Idle(400.0)) == []
    assert watch.step(healthy(21)[-1]) == []
    assert [alert.name for alert in watch.idle(Idle(201.0))] == ["no progress"]


def test_slow_steps_are_not_no_progress() -> None:
    slow: list[Record] = [{"step": step, "step_seconds": 60.0} for step in range(1, 11)]
    assert AlertWatch(SHIPPED, slow).idle(Idle(599.0)) == []
    assert AlertWatch(SHIPPED, slow).idle(Idle(601.0)) != []


def test_windows_go_on_over_a_restart() -> None:
    spiked = changed("loss", 300, 5.0)[299]
    assert AlertWatch(SHIPPED).step(spiked) == []
    assert [alert.name for alert in AlertWatch(SHIPPED, healthy(299)).step(spiked)] == ["loss spike"]


def test_a_run_can_be_judged_from_outside() -> None:
    assert failing_alerts(SHIPPED, healthy(), Idle(0.0)) == []
    assert [alert.name for alert in failing_alerts(SHIPPED, healthy(), Idle(1000.0))] == ["no progress"]
    assert [alert.name for alert in failing_alerts(SHIPPED, changed("loss", STEPS, 5.0), Idle(0.0))] == ["loss spike"]


def test_a_metric_that_a_run_does_not_have_says_nothing() -> None:
    alerts = [Alert(name="x", metric="mfu", rule=alert.rule) for alert in SHIPPED]
    assert failing_alerts(alerts, healthy(), Idle(1000.0)) == []


def test_a_speed_that_falls_where_samples_grow_longer_is_no_drop() -> None:
    records = changed("tokens_per_second", 250, 0.5)
    assert told(records) == [(255, "throughput drop")]
    for record in records:
        record["seq_length"] = 64 if record["step"] < 250 else 128
    assert told(records) == []
    for record in records[379:]:
        record["tokens_per_second"] *= 0.5
    assert told(records) == [(385, "throughput drop")]
