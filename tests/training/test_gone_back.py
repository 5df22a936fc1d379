"""The record of goings back: which checkpoint is chosen, what stands after a kill, when it is enough."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gpt4moe.checkpoint.base import base_folder, reference
from gpt4moe.checkpoint.health import SUSPECT, mark, reasons
from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.retention import (
    KEEP,
    LEFT,
    find_checkpoint,
    healthy_steps,
    keep_for,
    latest_saved,
    mark_between,
    prune,
    set_aside,
    stale_steps,
    step_folder,
)
from gpt4moe.config.load import load_run_config
from gpt4moe.data.passed_over import GONE_BACK_FILE, NOTHING, GoingBack, PassedOver, read_gone_back
from gpt4moe.errors import DataError, DivergenceError, LaunchError
from gpt4moe.runlog.events_log import EventsLog, read_events
from gpt4moe.runlog.run_files import noted_files
from gpt4moe.training import gone_back
from gpt4moe.training.go_back import mark_suspect
from gpt4moe.training.gone_back import decide, in_a_row, record, settle
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.state import TrainingContext
from tests.checkpoint.builders import dealt, state, write_checkpoint
from tests.training.command import SMALL

WORDS = (*SMALL, "run.name=x", "checkpoint.every=10", "resilience.on_spike=go_back", "resilience.pass_over_steps=3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of batches of 8, with checkpoints of steps 10, 20 ... 50; that of step 50 is suspect."""
    for step in range(10, 60, 10):
        _save(tmp_path, step)
    mark(step_folder(tmp_path / "checkpoints", 50), "step 45 was a spike")
    return tmp_path


def _save(folder: Path, step: int, passed_over: PassedOver = NOTHING) -> None:
    place = step_folder(folder / "checkpoints", step)
    write_checkpoint(place, dealt(state(step), 1, seed=step), step=step, passed_over=passed_over.as_lists() or None)


def _wrong(step: int) -> DivergenceError:
    error = DivergenceError(f"Step {step} has a spike.", "Lower it.")
    error.step = step
    return error


def test_it_goes_back_to_the_nth_newest_healthy_checkpoint(folder: Path) -> None:
    for nth, to_step in ((1, 40), (2, 30), (9, 10)):
        run = load_run_config([*WORDS, f"resilience.go_back_checkpoints={nth}", "checkpoint.keep=0"])
        found = decide(folder, run, NOTHING, _wrong(57))
        assert (found.to_step, found.samples) == (to_step, 8 * (57 - to_step + 3))
        (folder / "gone_back.json").unlink()


def test_the_window_counts_samples_by_the_ramp_of_batch_sizes(folder: Path) -> None:
    ramp = "training.batch_ramp=[{global_batch_size: 4, until_samples: 80}]"  # until step 20
    run = load_run_config([*WORDS, ramp])
    found = decide(folder, run, NOTHING, _wrong(17))
    assert (found.to_step, found.samples) == (10, 4 * (17 - 10 + 3))
    over = settle(folder)
    assert over is not None and over.position(run.step_sizes.samples(10)) == 40 + 40
    assert run.step_sizes.at_sample(run.step_sizes.samples(10)).global_batch_size == 4, "sizes go by what was read"


def test_where_none_is_healthy_it_goes_to_the_oldest(folder: Path) -> None:
    for step in range(10, 50, 10):
        mark(step_folder(folder / "checkpoints", step), "unequal copies")
    assert decide(folder, load_run_config([*WORDS]), NOTHING, _wrong(57)).to_step == 10


def test_what_was_saved_before_the_decision_stands_no_more_and_what_came_after_it_does(folder: Path) -> None:
    assert (latest_saved(folder), settle(folder)) == (50, None)
    decide(folder, load_run_config([*WORDS]), NOTHING, _wrong(57))
    assert (latest_saved(folder), stale_steps(folder)) == (40, [50])  # killed before they were renamed
    assert find_checkpoint(folder) == step_folder(folder / "checkpoints", 40)
    passed_over = settle(folder)
    assert passed_over == PassedOver(((320, 160),)) and stale_steps(folder) == []
    _save(folder, 50, passed_over)
    assert settle(folder) == passed_over and latest_saved(folder) == 50
    left = folder / "checkpoints" / f"{LEFT}step-00000050"
    assert reasons(left) == ["step 45 was a spike"]
    (left / KEEP).touch()
    assert prune(folder / "checkpoints", keep=0, keep_every=0) == [] and left.exists(), "adapters may stand on it"
    (left / KEEP).unlink()
    assert prune(folder / "checkpoints", keep=0, keep_every=25) == [] and not left.exists()


def test_any_changed_digit_of_the_record_is_found_before_a_checkpoint_is_left(folder: Path) -> None:
    decide(folder, load_run_config([*WORDS]), NOTHING, _wrong(57))
    _save(folder, 50, settle(folder) or NOTHING)
    path = folder / "gone_back.json"
    text = path.read_text()
    path.write_text(text.replace("160", "161"))
    for read in (latest_saved, settle, find_checkpoint):
        with pytest.raises(DataError, match="sha256 differs"):
            read(folder)
    path.write_text(text)
    assert latest_saved(folder) == 50


def test_a_record_that_is_gone_or_an_older_one_is_found_at_the_next_launch(tmp_path: Path) -> None:
    """Without it the run would read again what it went back from."""
    run = load_run_config(["+experiment=tiny", "run.name=x", f"run.root={tmp_path}"])
    folder, data = RunFolder.of(run), {"data": "one", "tokenizer": "none"}
    folder.path.mkdir()
    folder.freeze(run, data)
    file = folder.path / GONE_BACK_FILE
    record(folder.path, PassedOver(((320, 160),)))  # of the checkpoint that the run begins with
    (folder.path / "starts").mkdir()
    (folder.path / "starts" / "001.yaml").write_text("{}")
    folder.freeze(run, data)  # by a second launch: the first one ended before its step
    folder.metrics.write_text('{"step": 1}\n')
    assert [*noted_files(folder.path, "starts/")] == [folder.path / "starts" / "001.yaml"]
    folder.check_identity(run, data)
    older = file.read_bytes()
    record(folder.path, PassedOver(((320, 160), (640, 80))))
    folder.check_identity(run, data)
    file.write_bytes(older)
    with pytest.raises(LaunchError, match=r"gone_back\.json is not what was written"):
        folder.check_identity(run, data)
    file.unlink()
    with pytest.raises(LaunchError, match=r"gone_back\.json is damaged or gone"):
        folder.check_identity(run, data)


def test_a_later_going_back_further_passes_over_what_an_earlier_one_did(folder: Path) -> None:
    run = load_run_config([*WORDS])
    decide(folder, run, NOTHING, _wrong(57))
    once = settle(folder)
    assert once is not None
    mark(step_folder(folder / "checkpoints", 40), "unequal copies")
    decide(folder, run, once, _wrong(44))
    assert latest_saved(folder) == 30
    found = read_gone_back(folder)
    assert found is not None and found[0] == PassedOver(((240, 8 * (20 + 13 + 1 + 3)),))
    assert [(it.step, it.to_step) for it in found[1]] == [(57, 40), (44, 30)]


def test_only_goings_back_without_a_healthy_checkpoint_beyond_count(folder: Path) -> None:
    for count, *times in (
        (1, (57, 40)),
        (2, (57, 40), (60, 50)),
        (1, (57, 40), (71, 60)),
        (2, (9, 5), (57, 40), (58, 40)),
    ):
        went = [GoingBack(step=step, to_step=5, newest=newest, samples=8, cause="", time=0.0) for step, newest in times]
        assert in_a_row(went) == count
    run, over = load_run_config([*WORDS, "resilience.max_go_backs=2"]), NOTHING
    for step in (57, 48):
        decide(folder, run, over, _wrong(step))
        over = settle(folder) or NOTHING
    record = (folder / "gone_back.json").read_bytes()
    with pytest.raises(DivergenceError, match="gone back 2 times in a row, at last to step 40"):
        decide(folder, run, over, _wrong(47))
    assert (folder / "gone_back.json").read_bytes() == record
    _save(folder, 60, over)
    assert decide(folder, run, over, _wrong(61)).to_step == 60


def test_the_last_healthy_checkpoint_is_never_removed(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    assert healthy_steps(checkpoints) == [10, 20, 30, 40]
    assert prune(checkpoints, keep=1, keep_every=0) == [10, 20, 30]
    for step in (60, 70):
        _save(folder, step)
        mark(step_folder(checkpoints, step), "a spike")
        prune(checkpoints, keep=1, keep_every=0)
    assert healthy_steps(checkpoints) == [40]
    _save(folder, 80)
    assert prune(checkpoints, keep=1, keep_every=0) == [40, 70]


def test_so_many_healthy_ones_stay_as_a_going_back_wants_whatever_becomes_suspect(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    assert prune(checkpoints, keep=3, keep_every=0, keep_healthy=3) == [10]
    _save(folder, 60)
    assert prune(checkpoints, keep=1, keep_every=0, keep_healthy=2, suspect_steps=21) == [20, 50]
    mark_between(checkpoints, 61 - 21, 60, "step 61 has a spike")
    assert healthy_steps(checkpoints) == [30, 40]


def test_a_decision_that_is_written_stands_where_its_folder_cannot_be_synced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gone_back, "sync_folder", refused)
    assert decide(folder, load_run_config([*WORDS]), NOTHING, _wrong(57)).to_step == 40
    assert latest_saved(folder) == 40 and "Input/output error" in caplog.text


def test_adapters_find_their_base_under_the_name_that_going_back_gave_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = step_folder(folder / "checkpoints", 50)
    adapters = dataclasses.replace(Manifest.load(base), base=reference(base))
    keep_for(base, folder)
    decide(folder, load_run_config([*WORDS]), NOTHING, _wrong(57))
    passed_over = settle(folder)
    assert "other runs need the checkpoint that is" in caplog.text and "left-step-00000050" in caplog.text
    assert base_folder(adapters).name == "left-step-00000050"
    _save(folder, 50, passed_over or NOTHING)
    assert base_folder(adapters).name == "left-step-00000050"
    for number in range(2, 101):
        (folder / "checkpoints" / f"{LEFT}step-00000050.{number}").mkdir()
    assert set_aside(folder / "checkpoints", 50, LEFT).name == "left-step-00000050.101"


def test_a_mark_is_written_once_and_one_that_cannot_be_read_is_a_mark(folder: Path) -> None:
    place = step_folder(folder / "checkpoints", 50)
    mark(place, "step 45 was a spike")
    mark(place, "step 57 has a spike")
    assert reasons(place) == ["step 45 was a spike", "step 57 has a spike"]
    assert json.loads((place / SUSPECT).read_text()) == {"reasons": reasons(place)}
    (place / SUSPECT).write_text("{")
    assert reasons(place) == ["suspect.json cannot be read"] and (place / NAME).exists()


def test_a_checkpoint_that_becomes_suspect_is_an_alert(folder: Path) -> None:
    with EventsLog(folder / "events.jsonl") as events:
        context = SimpleNamespace(
            groups=SimpleNamespace(is_first_rank=True), folder=SimpleNamespace(checkpoints=folder / "checkpoints"),
            state=SimpleNamespace(step=57), events=events,
        )  # fmt: skip
        mark_suspect(cast(TrainingContext, context), 30, 40, "unequal copies")
    (told,) = read_events(folder / "events.jsonl")
    assert (told["event"], told["step"], told["name"]) == ("alert", 57, "suspect checkpoint")
    assert told["text"] == "the checkpoint of step 40: unequal copies"
