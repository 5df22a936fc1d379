"""What a drill says of each fault, with launches that are told how they end: none is started."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gpt4moe.drill.account import Result, add_restarts, availability
from gpt4moe.drill.drill import Drill
from gpt4moe.drill.kinds import Fault
from gpt4moe.drill.launches import Ended
from gpt4moe.drill.scene import Scene
from gpt4moe.errors import LaunchError
from tests.drill.small import event, outcome, run

LAST = {1: 5.0, 2: 4.0}


def fault(number: int, kind: str, moment: str = "save") -> Fault:
    return Fault(number=number, kind=kind, moment=moment, step=number, rank=0)


def ended(status: int, *came: int) -> Ended:
    return Ended(status=status, began=10.0, at=30.0, came=dict.fromkeys(came, 25.0), log="its log")


class Told:
    """A drill whose launches end as they are told. `given`: the faults that each launch had."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.given = folder, list[list[int]]()
        self.monkeypatch = monkeypatch
        self.before_end: Callable[[], None] = lambda: None

    def drill(self, plan: list[Fault], *launches: Ended) -> Result:
        events = [
            event("start", 0.0, resumed_step=0), event("first_step", 11.0, step=1, seconds=1.0),
            event("stop", 30.0, step=2, reason="finished", is_error=False),
        ]  # fmt: skip
        run(self.folder / "plain", LAST)
        (run(self.folder / "drilled", LAST) / "events.jsonl").write_text("\n".join(events) + "\n")
        left = list(launches)

        def launch(scene: Scene, name: str, faults: Sequence[Fault], **more: object) -> Ended:
            if name == "plain":
                return ended(0)
            self.given.append([it.number for it in faults])
            if len(left) == 1:
                self.before_end()
            return left.pop(0)

        self.monkeypatch.setattr(Scene, "build", lambda scene: None)
        self.monkeypatch.setattr("gpt4moe.drill.drill.launch", launch)
        scene = Scene(folder=self.folder, ranks=2, steps=2)
        return Drill(scene=scene, plan=plan, seed=1, is_cold=True, hang_seconds=1.0, say=lambda line: None).run()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(tmp_path, monkeypatch)


def test_a_fault_that_ends_no_launch_is_given_again_until_it_comes(told: Told) -> None:
    result = told.drill([fault(1, "slow_disk"), fault(2, "kill_all", "start")], ended(137, 2), ended(0, 1))
    assert told.given == [[1, 2], [1]], "the kill in the start-up came before any save"
    assert [it.wrong for it in result.outcomes] == ["", ""] and result.is_good


def test_a_fault_that_came_in_an_earlier_launch_is_not_forgotten(told: Told) -> None:
    result = told.drill([fault(1, "slow_disk"), fault(2, "kill_all")], ended(137, 1, 2), ended(0))
    assert told.given == [[1, 2], []] and result.is_good
    assert [it.came_at for it in result.outcomes] == [25.0, 25.0]


@pytest.mark.parametrize("kind", ["slow_disk", "kill_all"])
def test_a_fault_that_did_not_come_is_not_survived(kind: str, told: Told) -> None:
    result = told.drill([fault(1, kind)], ended(0))
    assert result.outcomes[0].wrong == "it did not come" and not result.is_good


def test_a_fault_that_came_and_ended_no_launch_is_not_survived(told: Told) -> None:
    result = told.drill([fault(1, "kill_rank")], ended(0, 1))
    assert result.outcomes[0].wrong == "it came and ended no launch" and not result.is_good


def test_a_launch_that_ends_with_no_fault_in_it_ends_the_drill(told: Told) -> None:
    with pytest.raises(LaunchError, match="without faults ended with 2"):
        told.drill([fault(1, "kill_all")], ended(137, 1), ended(2))


@pytest.mark.parametrize("is_set_aside", [True, False])
def test_a_damaged_checkpoint_that_is_not_set_aside_is_wrong_in_its_own_row(is_set_aside: bool, told: Told) -> None:
    step = told.folder / "drilled" / "checkpoints" / "step-00000002"

    def as_a_launch_does() -> None:
        assert (step / "rank-00000.safetensors").read_bytes() != b"w", "a bit of it is flipped"
        step.rename(step.with_name(f"damaged-{step.name}.2"))
        step.mkdir()
        (step / "manifest.json").write_text("{}")
        (step / "rank-00000.safetensors").write_bytes(b"w")

    told.before_end = as_a_launch_does if is_set_aside else lambda: None
    result = told.drill([fault(1, "checkpoint_bit", "step")], ended(137, 1), ended(0))
    assert ("set it aside" in result.outcomes[0].wrong) is not is_set_aside
    assert result.is_good is is_set_aside


def test_a_healthy_checkpoint_that_is_set_aside_is_wrong(told: Told) -> None:
    (told.folder / "drilled" / "checkpoints" / "damaged-step-00000001").mkdir(parents=True)
    result = told.drill([fault(1, "slow_disk")], ended(0, 1))
    assert result.wrong == ["damaged-step-00000001 has no flipped bit"]


def test_steps_redone_belong_to_the_fault_that_lost_them(tmp_path: Path) -> None:
    """A bit in the data is found by a launch that writes its start first; two faults come in start-ups."""
    found = [
        outcome(1, 14.5, 0.5, kind="data_bit"), outcome(2, 18.0, 0.5, moment="start"),
        outcome(3, 25.0, 0.5), outcome(4, 26.0, 0.5, moment="resume"),
    ]  # fmt: skip
    lines = [
        event("start", 0.0, resumed_step=0), event("first_step", 11.0, step=1, seconds=1.0),
        event("start", 15.0, resumed_step=2, redone_steps=2, redone_seconds=2.0),
        event("stop", 16.0, step=2, reason="DataError", is_error=True),
        event("start", 19.0, resumed_step=2, redone_steps=2, redone_seconds=2.0),
        event("first_step", 22.0, step=3, seconds=1.0),
        event("start", 27.0, resumed_step=4, redone_steps=1, redone_seconds=1.5),
        event("first_step", 30.0, step=5, seconds=1.0),
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    add_restarts(found, [17.0, 18.5, 25.5, 26.5], tmp_path)
    assert [(it.redone_steps, it.redone_seconds) for it in found] == [(2, 2.0), (0, 0.0), (1, 1.5), (0, 0.0)]
    assert [it.is_cut_off for it in found] == [True, False, True, False]
    assert [it.restart_seconds for it in found] == [1.0, 2.5, 0.5, 2.5]


def test_a_fault_after_which_nothing_began_has_no_restart(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(event("start", 0.0, resumed_step=0) + "\n")
    found = [outcome(1, 14.5, 0.5)]
    add_restarts(found, [15.0], tmp_path)
    assert (found[0].restart_seconds, found[0].is_cut_off) == (None, True)
    assert json.dumps(found[0].restart_seconds) == "null"


def test_a_full_disk_is_lost_time_from_the_last_step_that_was_still_made(tmp_path: Path) -> None:
    """The disk is full at 14.5; steps go on until the save at 17; no rank is left at 18."""
    folder = run(tmp_path, {step: 5.0 for step in range(1, 8)})
    lines = [
        event("start", 0.0, resumed_step=0), event("first_step", 11.0, step=1, seconds=1.0),
        event("stop", 17.5, step=7, reason="SaveFailed", is_error=True),
        event("start", 19.0, resumed_step=4, redone_steps=3, redone_seconds=3.0, last_sign_of_life=17.0),
        event("first_step", 22.0, step=5, seconds=1.0),
        event("stop", 24.0, step=7, reason="finished", is_error=False),
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    found = [outcome(1, 14.5, 3.5, kind="full_disk")]
    add_restarts(found, [18.0], folder)
    assert (found[0].went_on_seconds, found[0].restart_seconds, found[0].redone_seconds) == (2.5, 3.0, 3.0)
    account = availability(found, folder, 24.0)
    assert (account.detect_seconds, account.measured) == (1.0, pytest.approx(account.formula))
