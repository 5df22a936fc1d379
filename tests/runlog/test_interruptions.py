"""Each interruption is one line: when, what, which rank, what it cost; and the strip shows the time that it took."""

from pathlib import Path

import pytest

from gpt4moe.pages.availability import availability_section
from gpt4moe.runlog.events_log import Event
from gpt4moe.runlog.goodput import Goodput, goodput
from gpt4moe.runlog.interruptions import Interruption, first_failures, interruptions, shares_up
from tests.runlog.test_goodput import KILLED, RESUMED, STEPS, event, start


def account(events: list[Event]) -> Goodput:
    records = [{"step": step, "step_seconds": seconds} for step, seconds in STEPS.items()]
    found = goodput(events, records, last_sign_of_life=events[-1]["time"])
    assert found is not None
    return found


def interrupted(events: list[Event], failed: dict[tuple[int, int], str] | None = None) -> list[Interruption]:
    return interruptions(events, account(events).attempts, failed or {})


def test_a_kill_names_the_rank_that_failed_first_and_its_cost_to_the_second(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "7-0.failed").symlink_to("137: rank 3 on node2")
    (tmp_path / "logs" / "7-0.log").touch()
    (found,) = interrupted([*KILLED, *RESUMED], first_failures(tmp_path))
    assert (found.at, found.step, found.what, found.where) == (138.0, 7, "killed", "rank 3 on node2")
    assert (found.redone_steps, found.redone_seconds) == (2, 4.0)
    # Down to 150, in the queue to 200, its first step began at 215.
    assert found.waited_seconds == pytest.approx(12 + 50 + 15)
    assert found.cost_seconds == pytest.approx(81)


def test_an_error_tells_its_cause_and_the_rank_that_it_names() -> None:
    cause = "After step 9, copies are not equal: w on ranks 2, 3 (not on 0)."
    stop = event("stop", 40.0, step=9, reason="ReplicaError", is_error=True, cause=cause)
    first = [start(0.0), event("first_step", 22.0, step=1, seconds=2.0), stop]
    (found,) = interrupted(first)
    assert (found.what, found.where, found.cause) == ("ReplicaError", "ranks 2, 3", cause)
    assert found.cost_seconds == 0, "nobody has started it again"


def test_a_finished_and_a_running_launch_are_no_interruption() -> None:
    done = [start(0.0), event("first_step", 22.0, step=1, seconds=2.0), event("stop", 40.0, step=9, reason="finished")]
    assert interrupted(done) == []
    records = [{"step": 1, "step_seconds": 2.0}]
    running = goodput(done[:2], records, last_sign_of_life=50.0, is_running=True)
    assert running is not None and interruptions(done[:2], running.attempts, {}) == []


def test_the_strip_has_the_time_in_which_steps_were_made() -> None:
    events = [*KILLED, *RESUMED]
    # 234 s of wall time, from the job's start at 100 on: steps from 120 to 138 and from 215 to 234.
    shares = shares_up(account(events).attempts, 134)
    assert [second for second, share in enumerate(shares, start=100) if share > 0.99] == [
        *range(120, 138), *range(215, 234),
    ]  # fmt: skip
    assert sum(shares) == pytest.approx(18 + 19)


def test_the_report_s_section_escapes_causes_and_is_empty_without_interruptions() -> None:
    events = [*KILLED, *RESUMED]
    found = interrupted(events, {(7, 0): "rank 3 on <b>node</b>"})
    section = availability_section(account(events), found)
    assert section.count("<rect") >= 240 and "1 interruption cost 0:01:21" in section
    assert "&lt;b&gt;node" in section and "<b>node" not in section
    assert availability_section(account(events), []) == ""
