"""A launch that hangs or loses a rank names that rank, says in what the others wait, and ends; real processes."""

import json
from pathlib import Path

import pytest

from gpt4moe.runlog.events_log import Event, read_events
from tests.training.command import metrics
from tests.training.launched import Fault, Left, launch

FOUR = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")
PATIENCE = ("resilience.hang_seconds=3",)
"""The limit is at least three times the longest step. A collective's own limit is 30 minutes, and `launch` gives a rank
that has not ended by itself within some no status."""


def told(left: list[Left]) -> list[str]:
    """What all ranks together say on stderr, without torch's lines of a store that has gone."""
    return [line for rank in left for line in rank.err.splitlines() if line.startswith(("error: ", "Where they wait"))]


def last_events(folder: Path) -> tuple[Event, Event]:
    hang, stop = read_events(folder / "events.jsonl")[-2:]
    assert (hang["event"], stop["event"], stop["reason"]) == ("hang", "stop", "hang")
    assert stop["cause"] == hang["cause"]
    return hang, stop


@pytest.mark.parametrize("what", ["sleep", "sleep in layer"])
def test_a_rank_that_hangs_outside_a_collective_is_named_and_where_it_stands(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    left = launch(folder, Fault(what=what, rank=2), *FOUR, *PATIENCE, ranks=4)
    assert [rank.status for rank in left] == [86] * 4, left
    who, where = told(left)
    assert "rank 2 on " in who and " is in no collective: rank 2 in step 3, " in who and "launched.py" in who, who
    hang, _ = last_events(folder)
    assert f"error: {hang['cause']}" == who and hang["step"] == 2
    stacks = sorted(file.name for file in Path(hang["stacks"]).iterdir())
    assert {f"rank-0000{rank}.txt" for rank in range(4)} < set(stacks)
    text = (Path(hang["stacks"]) / "rank-00002.txt").read_text()
    assert "launched.py" in text and "loop.py" in text
    assert left[0].err.startswith("warning: rank 0 has not moved for ") and "the launch ends with 86." in left[0].err
    if what == "sleep":
        assert "ranks 0-1, 3 in step 3, all_reduce of world (gpt4moe/parallel/agreement.py" in where, where
    else:
        # Its tensor-parallel pair waits for it in the same layer, the stage before for its gradients.
        assert "in step 3, " in who and "layer 1, micro-batch 0" in who, who
        assert "of ep (layer 1, micro-batch 0" in where or "of tp (layer 1, micro-batch 0" in where, where
        assert "send and receive of pp (micro-batch 0" in where, where
        recorded = json.loads((Path(hang["stacks"]) / "rank-00003.recorder.json").read_text())
        assert not recorded["entries"][-1]["retired"]


def test_a_rank_in_another_collective_than_the_others_is_named(tmp_path: Path) -> None:
    left = launch(tmp_path / "x", Fault(what="go astray", rank=1), *FOUR, *PATIENCE, ranks=4)
    assert [rank.status for rank in left] == [86] * 4
    who, where = told(left)
    assert "rank 1 is in another collective than the others: rank 1 in step 3, all_reduce of tp (" in who, who
    assert "ranks 0, 2-3 in step 3, all_reduce of world" in where, where


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_rank_is_named_also_where_it_serves_the_store(rank: int, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    left = launch(folder, Fault(what="stop", rank=rank), "parallel.pp=2", *PATIENCE, ranks=2)
    assert [left[rank].status, left[1 - rank].status] == [None, 86]
    who, where = told(left)
    assert "rank 0 is stopped, killed or lost" in who if rank == 0 else "rank 1 on " in who and "no heartbeat" in who
    assert f"rank {1 - rank} in step 3, all_reduce of world" in where, where
    hang, _ = last_events(folder)
    assert (Path(hang["stacks"]) / f"rank-0000{1 - rank}.txt").exists()


def test_a_rank_that_raises_is_told_alone_and_ends_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    left = launch(folder, Fault(what="raise", rank=1), *FOUR, ranks=4)
    assert [rank.status for rank in left] == [1] * 4
    line, *below = left[1].err.splitlines()
    assert line.startswith("error: rank 1 on ") and "failed in step 3: RuntimeError: a planted error (" in line
    assert "launched.py:" in line and below[0].startswith("Traceback") and below[-1] == "with a second line"
    assert [rank.err for rank in left if rank is not left[1]] == ["", "", ""]
    stop = read_events(folder / "events.jsonl")[-1]
    assert (stop["event"], f"error: {stop['cause']}") == ("stop", line)


def test_an_error_of_bad_input_that_one_rank_has_alone_ends_the_others_too(tmp_path: Path) -> None:
    left = launch(tmp_path / "x", Fault(what="refuse", rank=1), "parallel.pp=2", ranks=2)
    assert [rank.status for rank in left] == [2, 2]
    line, cure = left[0].err.splitlines()
    assert line.startswith("error: rank 1 on ") and line.endswith("ended alone: Only here.") and cure == "Mend it."


@pytest.mark.parametrize("rank", [2, 0])
def test_a_killed_rank_is_named_and_the_others_ask_to_be_put_back(rank: int, tmp_path: Path) -> None:
    left = launch(tmp_path / "x", Fault(what="kill", rank=rank), *FOUR, ranks=4)
    assert [one.status for one in left] == [-9 if place == rank else 86 for place in range(4)]
    (line,) = told(left)
    assert line.startswith("error: rank 2 on " if rank else "error: rank 0 is stopped, killed or lost"), line
    assert not any("Traceback" in one.err for one in left)


def test_a_slow_rank_is_the_busiest_by_the_beats_alone(tmp_path: Path) -> None:
    folder, keys = tmp_path / "x", ("parallel.tp=2", "parallel.ep=2", "training.steps=16")
    left = launch(folder, Fault(what="be slow", rank=1, after_step=1), *keys, ranks=2)
    assert [rank.status for rank in left] == [0, 0], left
    seen = [record for record in metrics(folder, timings=True) if "busiest_rank" in record]
    assert seen and seen[-1]["busiest_rank"] == 1 and seen[-1]["busiest_rank_ratio"] > 1.5, seen
    assert "rank 1 on " in left[0].out and "is slow: it works" in left[0].out
