"""A long save is no alarm and a hang in one is: what a start waits for, and how long that took before."""

from gpt4moe.runlog.alerts import Alert, AlertWatch, Stalled
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.waits import Waits, longest_waits

NO_PROGRESS = [Alert(name="no progress", metric="step_seconds", rule=Stalled(times=10, seconds=300))]
STEPS: list[Record] = [{"step": step, "step_seconds": 2.0} for step in range(1, 11)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_long_save_stops_the_clock_of_steps_and_has_its_own() -> None:
    clock, watch = Clock(), AlertWatch(NO_PROGRESS, STEPS)
    waits = Waits(clock)
    waits.end()  # the first step

    def told(seconds: float) -> list[str]:
        clock.now += seconds
        return [alert.text for alert in watch.idle(waits.idle())]

    assert told(299.0) == []
    waits.begin("checkpoint")
    assert told(899.0) == [], "the first save may take three times as long as no step"
    assert waits.end() == 899.0
    assert told(299.0) == [], "the clock of steps begins anew"
    waits.begin("checkpoint")
    assert told(8989.0) == [], "ten times the longest before"
    assert told(2.0) == ["step_seconds: no step for 2:29:51: stuck in checkpoint; before, took 899 s at most"]
    waits.end()
    waits.begin("evaluation")
    assert told(899.0) == [], "each kind has its own"
    assert told(2.0) == ["step_seconds: no step for 0:15:01: stuck in evaluation; before, there was none"]
    waits.end()
    assert told(0.0) == []
    assert told(301.0) == ["step_seconds: no step for 0:05:01, where one takes 2 s"]


def test_a_start_up_is_measured_by_those_of_earlier_starts() -> None:
    clock, watch = Clock(), AlertWatch(NO_PROGRESS, STEPS)
    begun = {"event": "start", "time": 1000.0}
    first = {"event": "first_step", "time": 1200.0, "seconds": 2.0}
    hung = {"event": "start", "time": 2000.0}
    longest = longest_waits([begun, first, {"event": "evaluation", "time": 1300.0, "seconds": 5.0}, hung])
    assert longest == {"start_up": 200.0, "evaluation": 5.0}, "a start that made no step says nothing of the usual"
    waits = Waits(clock)
    waits.started(100.0, longest)
    clock.now = 1899.0
    assert watch.idle(waits.idle()) == []
    clock.now = 1901.0
    assert "0:33:21: stuck in start-up; before, took 200 s at most" in watch.idle(waits.idle())[0].text
