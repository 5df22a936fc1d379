"""Goodput: every second of a run has one cause, and the causes add up to the clock."""

from typing import Any

import pytest

from gpt4moe.pages.report_tables import goodput_section
from gpt4moe.runlog.events_log import Event
from gpt4moe.runlog.goodput import CAUSES, Goodput, by_launch, goodput, redone


def start(time: float, resumed_step: int = 0, **fields: Any) -> Event:
    unknown = dict.fromkeys(("job", "submitted", "job_started", "last_sign_of_life"))
    return {
        "event": "start", "time": time, "run": "x", "ranks": 4, "layout": "4 ranks", "total_steps": 10,
        "resumed_step": resumed_step, "redone_steps": 0, "redone_seconds": 0.0, **unknown, **fields,
    }  # fmt: skip


def event(kind: str, time: float, **fields: Any) -> Event:
    return {"event": kind, "time": time, **fields}


def account(events: list[Event], steps: dict[int, float], **given: Any) -> Goodput:
    given.setdefault("last_sign_of_life", 0.0)
    records = [{"step": step, "step_seconds": seconds} for step, seconds in steps.items()]
    found = goodput(events, records, **given)
    assert found is not None
    assert list(found.seconds) == list(CAUSES)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds)
    return found


def lost(found: Goodput) -> dict[str, float]:
    return {cause: round(seconds, 6) for cause, seconds in found.seconds.items() if abs(seconds) > 1e-6}


# Submitted at 0, the job at 100, the process at 103, steps of 2 s; killed at 140 in step 8, resumed from 5.
KILLED = [
    start(103.0, job=7, submitted=0.0, job_started=100.0),
    event("first_step", 122.0, step=1, seconds=2.0),
    event("checkpoint", 131.0, step=5, seconds=1.0),
]
RESUMED = [
    start(
        205.0, 5, job=7, submitted=150.0, job_started=200.0, last_sign_of_life=138.0, redone_steps=2, redone_seconds=4.0
    ),
    event("first_step", 217.0, step=6, seconds=2.0),
    event("evaluation", 223.0, step=10, seconds=3.0),
    event("checkpoint", 230.0, step=10, seconds=1.5),
    event("report", 233.0, step=10, seconds=2.5),
    event("stop", 234.0, step=10, reason="finished"),
]  # fmt: skip
STEPS = {step: 2.0 for step in range(1, 11)}


def test_steps_that_two_launches_found_to_redo_are_counted_once() -> None:
    """The second launch ended before its first step: the third finds the same lines, and one more."""
    again = [start(300.0 + 10 * n, 5 - n, redone_steps=2 + n, redone_seconds=4.0 + 2 * n) for n in range(2)]
    found = redone(by_launch([*KILLED, *again, event("first_step", 320.0, step=5, seconds=2.0)]), "redone_seconds")
    assert found == [0.0, 4.0, 2.0]
    taken = [start(300.0, 5, redone_seconds=4.0), event("first_step", 302.0, step=6, seconds=2.0)]
    assert redone(by_launch([*taken, start(310.0, 5, redone_seconds=4.0)]), "redone_seconds") == [4.0, 4.0]


def test_a_killed_and_requeued_run_is_accounted_for_to_the_second() -> None:
    found = account([*KILLED, *RESUMED], STEPS)
    assert found.wall_seconds == pytest.approx(234.0)
    assert lost(found) == {
        "productive": 20.0,
        "start_up": 20.0 + 15.0,
        "redone": 4.0,
        "checkpoint": 1.0 + 1.5,
        "evaluation": 3.0,
        "report": 2.5,
        "other": 38.0 - 20 - 14 - 1 + 34.0 - 15 - 10 - 3 - 1.5 - 2.5,
        "queue": 100.0 + 50.0,
        "down": 12.0,
    }
    assert found.share == pytest.approx(20 / 234)
    assert [(a.end, a.resumed_step, a.last_step) for a in found.attempts] == [("killed", 0, 7), ("finished", 5, 10)]


def test_what_a_launch_needs_to_notice_its_own_end_is_down() -> None:
    """A watchdog waited for a rank, and ended the launch 8 s after its last step: no more was made than by a kill."""
    told = [
        event("alert", 142.0, step=7, name="watchdog", text="rank 0 has not moved"),
        event("hang", 146.0, step=7, cause="rank 1"), event("stop", 148.0, step=7, reason="hang", is_error=True),
    ]  # fmt: skip
    found = account([*KILLED, *told, *RESUMED], STEPS)
    assert lost(found) == lost(account([*KILLED, *RESUMED], STEPS))
    assert (found.attempts[0].end, found.attempts[0].ended) == ("hang", 138.0)
    unseen = account([*KILLED, *told, {**RESUMED[0], "last_sign_of_life": None}, *RESUMED[1:]], STEPS)
    assert unseen.attempts[0].ended == 131.0, "its checkpoint is the last that is known of it"
    last = account([*KILLED, *told], STEPS, last_sign_of_life=138.0)
    assert last.wall_seconds == pytest.approx(138.0)


def test_without_slurm_the_clock_begins_with_the_process_and_all_between_starts_is_down() -> None:
    events = [dict(event, submitted=None, job_started=None) for event in [*KILLED, *RESUMED]]
    found = account(events, STEPS)
    assert found.wall_seconds == pytest.approx(234.0 - 103.0)
    assert found.seconds["queue"] == 0.0
    assert found.seconds["down"] == pytest.approx(205.0 - 138.0)


def test_a_running_run_counts_to_its_last_step_and_a_waiting_one_to_now() -> None:
    steps = {step: 2.0 for step in range(1, 8)}
    running = account(KILLED, steps, last_sign_of_life=138.0, is_running=True)
    assert (running.wall_seconds, running.attempts[-1].end) == (138.0, "running")
    waiting = account(KILLED, steps, last_sign_of_life=138.0, waiting_until=160.0)
    assert (waiting.attempts[-1].end, waiting.seconds["queue"]) == ("killed", 122.0)


def test_a_first_step_that_is_computed_twice_is_not_counted_twice() -> None:
    twice = event("recompute", 122.0, step=1, seconds=3.0)
    found = account([KILLED[0], twice, *KILLED[1:]], {1: 2.0}, last_sign_of_life=138.0)
    assert lost(found) | {"queue": 0.0, "checkpoint": 0.0} == {
        "productive": 2.0, "start_up": 17.0, "recompute": 3.0, "other": 138.0 - 122.0 - 1.0, "queue": 0.0,
        "checkpoint": 0.0,
    }  # fmt: skip


def test_a_start_that_never_made_a_step_was_start_up_alone() -> None:
    second = start(205.0, 0, written=209.0, last_sign_of_life=111.0)
    found = account([start(100.0, written=111.0), second], {})
    assert lost(found) == {"start_up": 11.0 + 4.0, "down": 94.0}
    assert found.share == 0.0


def test_time_between_the_end_of_a_run_and_its_extension_is_nobodys() -> None:
    later = start(10_000.0, 10, job=9, submitted=9_990.0, job_started=9_999.0, last_sign_of_life=234.0)
    events = [*KILLED, *RESUMED, later, event("first_step", 10_010.0, step=11, seconds=2.0)]
    found = account(events, {**STEPS, 11: 2.0}, last_sign_of_life=10_010.0)
    assert found.wall_seconds == pytest.approx(234.0 + 20.0)
    assert found.seconds["queue"] == pytest.approx(159.0)


def test_two_starts_in_one_allocation_share_no_second() -> None:
    first = [
        start(103.0, job=7, submitted=90.0, job_started=100.0), event("first_step", 110.0, step=1, seconds=2.0),
        event("stop", 112.0, step=1, reason="SIGTERM"),
    ]  # fmt: skip
    second = [
        start(120.0, 1, job=7, submitted=90.0, job_started=100.0, last_sign_of_life=112.0),
        event("first_step", 130.0, step=2, seconds=2.0), event("stop", 130.5, step=2, reason="finished"),
    ]  # fmt: skip
    found = account([*first, *second], {1: 2.0, 2: 2.0})
    assert found.wall_seconds == pytest.approx(40.5)
    assert (found.seconds["queue"], found.seconds["down"]) == (10.0, 8.0)


def test_a_copy_counts_from_its_own_first_start() -> None:
    copy = [start(300.0, 10, run="copy"), event("first_step", 310.0, step=11, seconds=2.0)]
    found = account([*KILLED, *RESUMED, *copy], {**STEPS, 11: 2.0}, last_sign_of_life=310.0)
    assert lost(found) == {"productive": 2.0, "start_up": 8.0}


def test_a_run_without_events_has_no_account() -> None:
    assert goodput([], [{"step": 1, "step_seconds": 1.0}], last_sign_of_life=5.0) is None


def test_the_report_shows_every_cause_that_took_time_and_no_other() -> None:
    section = goodput_section(account([*KILLED, *RESUMED], STEPS))
    assert "Goodput 8.5%" in section and "1 restart." in section
    rows = section.split("<tr>")[1:]
    assert [row.split("</i>")[1].split("</td>")[0] for row in rows] == [
        "productive", "start up", "redone", "checkpoint", "evaluation", "report", "other", "queue", "down",
    ]  # fmt: skip
    assert "<td>150.0 s</td><td>64.1%</td>" in rows[7]
    assert goodput_section(account([start(100.0)], {})) == "", "a run without a second has no bar"
