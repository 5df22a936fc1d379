"""What is told of beats, when a launch counts as hung, and where a thread stands; on paper."""

import sys
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.layout import ranks_text
from gpt4moe.resilience.hangs import Beat, End, Limits, busiest, told, why_hung
from gpt4moe.resilience.standing import Place, mark, place_of
from gpt4moe.training.hang_files import HangFiles, pending
from gpt4moe.training.roll_call import beat_seconds


def beat(rank: int = 0, **fields: Any) -> Beat:
    return Beat(**{"number": 1, "node": f"n{rank // 4}", "step": 7, "still_seconds": 50.0, **fields})


def waiting(collective: str, group: str, **fields: Any) -> Place:
    return Place(at="a.py:1 in f", collective=collective, group=group, **fields)


def test_a_beat_and_an_end_come_back_as_they_were() -> None:
    one = beat(place=waiting("all_reduce", "tp", layer=3, is_backward=True))
    assert Beat.decode(one.encode()) == one
    end = End(rank=1, status=86, lines=["a", "b"], writes_stacks=True)
    assert End.decode(end.encode()) == end


def test_thousands_of_ranks_are_told_in_two_short_lines() -> None:
    places = [waiting("all_to_all_single", "ep", layer=layer) for layer in range(40)]
    beats = {rank: beat(rank, place=places[rank % 40]) for rank in range(25_000)}
    lines = told(beats, [4097], what="Nothing has moved for 301 s")
    assert lines[0].startswith("Nothing has moved for 301 s: rank 4097 on n1024 sends no heartbeat any more")
    assert max(map(len, lines)) < 1500 and "36 more places" in lines[1]
    assert ranks_text([3, 0, 5, 4]) == "ranks 0, 3-5"


def test_the_rank_outside_is_named_before_those_in_other_collectives() -> None:
    beats = {
        0: beat(place=waiting("recv", "pp")), 1: beat(place=waiting("all_reduce", "tp")),
        2: beat(place=Place(at="loader.py:3 in read")),
    }  # fmt: skip
    who, where = told(beats, [], what="Nothing")
    assert "rank 2 on n0 is in no collective: rank 2 in step 8, loader.py:3 in read" in who and "rank 2" not in where
    del beats[2]
    assert "they wait in different ones" in told(beats, [], what="Nothing")[0]
    beats[1] = beats[0]
    assert "every rank is in the same collective" in told(beats, [], what="Nothing")[0]


def test_a_hang_is_when_nothing_moves_or_no_step_ends_for_long() -> None:
    def why(*beats: Beat, is_rank_lost: bool = False) -> str:
        return why_hung(beats, is_rank_lost=is_rank_lost, slack=1)

    limits = {"allowed_seconds": 10.0, "lookout_seconds": 5.0}
    still, moving = beat(still_seconds=10.0, **limits), beat(still_seconds=0.1, **limits)
    assert why(still, still) == "Nothing has moved for 10 s" and not why(still, moving)
    assert not why(beat(still_seconds=8.9, **limits)) and why(beat(still_seconds=5.0, **limits), is_rank_lost=True)
    endless = beat(still_seconds=0.1, idle_seconds=41.0, **limits)
    assert why(endless) == "Ranks move, but no step has ended for 41 s" and not why(endless, is_rank_lost=True)
    assert not why() and not why(is_rank_lost=True), "of no beats"
    saving = beat(still_seconds=30.0, doing="checkpoint", allowed_seconds=40.0, lookout_seconds=40.0)
    assert not why(still, saving), "each by the limit of what it does"


def test_saves_and_long_steps_are_waited_for_longer() -> None:
    limits = Limits.of(load_run_config(["+experiment=tiny", "run.name=x", "resilience.hang_seconds=100"]).resilience)
    assert limits.allowed("", longest_step=5, longest_wait=0) == 100
    assert limits.allowed("", longest_step=50, longest_wait=900) == 150
    assert limits.allowed("checkpoint", longest_step=5, longest_wait=20) == 400
    assert limits.allowed("checkpoint", longest_step=5, longest_wait=300) == 600
    assert limits.lookout("", longest_step=5, longest_wait=0) == 30
    assert limits.lookout("", longest_step=40, longest_wait=0) == 80, "nor is a silent rank lost within a long step"
    assert Limits(hang_seconds=0).allowed("", longest_step=1, longest_wait=0) == float("inf")
    assert (beat_seconds(4, 300), beat_seconds(24_960, 300), beat_seconds(4, 4)) == (1.0, pytest.approx(4.992), 0.5)


def test_the_busiest_rank_is_compared_with_those_of_its_stage() -> None:
    shares = {0: 0.4, 1: 0.5, 2: 0.9, 3: 0.95}
    beats = {rank: beat(busy_share=share) for rank, share in shares.items()}
    assert busiest(beats, lambda rank: rank // 2) == (1, pytest.approx(1.25))
    assert busiest(beats, lambda rank: rank) is None, "each is the only one of its kind"


def test_the_oldest_open_collective_of_a_recorder_is_what_a_device_stands_in() -> None:
    def entry(state: str, *, retired: bool, name: str) -> dict[str, Any]:
        return {"process_group": [name, "x"], "profiling_name": "nccl:all_reduce", "state": state, "retired": retired}

    entries = [entry("completed", retired=True, name="0"), entry("started", retired=False, name="4")]
    assert pending({"entries": entries}, {"4": "tp"}) == ("all_reduce", "tp")
    assert pending({"entries": entries[:1]}, {}) == pending({}, {}) == ("", "")


SCHEDULES = "site-packages/megatron/core/pipeline_parallel/schedules.py"
ONE_F_ONE_B = """
def forward_backward_pipelining_without_interleaving(
    inner, i, num_warmup_microbatches, num_microbatches_remaining, waits
):
    input_tensors = [None] * waits
    inner()
"""
WRAPPED = "\n".join(
    [ONE_F_ONE_B.replace("    inner()", "    wrapper(inner)"), "def wrapper(inner):", "    inner()", ""]
)
"""As megatron-core 0.19.2 wraps each function of its communicator."""


def stands(code: str, name: str, arguments: Callable[[Callable[[], None]], tuple[Any, ...]], called: str) -> Place:
    """Where a thread stands that calls `name` of a stand-in for Megatron's schedules, which calls `called`."""
    go, here = threading.Event(), threading.Event()
    space: dict[str, Any] = {"here": here, "go": go}
    exec(compile(code + f"\ndef {called}():\n    here.set()\n    go.wait(30)\n", SCHEDULES, "exec"), space)
    thread = threading.Thread(target=space[name], args=arguments(space[called]), daemon=True)
    thread.start()
    assert here.wait(30)
    assert thread.ident is not None
    place = place_of(sys._current_frames()[thread.ident], {})
    go.set()
    thread.join(30)
    return place


@pytest.mark.parametrize(
    ("called", "i", "waits", "micro_batch"),
    [
        ("recv_forward", 0, 1, 1),  # the second of the warm-up comes
        ("send_forward_recv_backward", 3, 3, 3),  # its gradient comes from the next stage
        ("send_backward_recv_forward", 3, 2, 6),
        ("backward_step", 3, 2, 3),  # between: one forward pass, one backward pass
        ("backward_step", 0, 1, 6),  # the first of the last two, which has no forward pass left
        ("recv_backward", 1, 1, 7),
    ],
)  # fmt: skip
def test_the_micro_batch_of_a_pipeline_follows_from_its_loops(
    called: str, i: int, waits: int, micro_batch: int
) -> None:
    # Eight micro-batches on a stage with two of warm-up and six one by one.
    name = "forward_backward_pipelining_without_interleaving"
    for code in (ONE_F_ONE_B, WRAPPED):
        place = stands(code, name, lambda inner: (inner, i, 2, 6, waits), called)
        assert place.micro_batch == micro_batch
        assert place.is_backward is (called == "backward_step")


def test_frames_of_another_version_say_nothing_wrong() -> None:
    name = "forward_backward_pipelining_without_interleaving"
    place = stands(f"def {name}(inner):\n    inner()\n", name, lambda inner: (inner,), "backward_step")
    assert place.micro_batch is None and place.words.endswith("(backward pass, layer not known)")


def test_a_thread_that_moves_has_another_mark() -> None:
    frame: types.FrameType | None = sys._getframe()
    first = mark(frame)
    assert mark(frame) != first, "another instruction"
    names: Mapping[int, str] = {}
    assert place_of(None, names) == Place()


@pytest.mark.parametrize(("rank", "file"), [(7, "rank-00007.txt"), (2345, "002/rank-02345.txt")])
def test_no_folder_has_the_stacks_of_more_than_a_thousand_ranks(rank: int, file: str, tmp_path: Path) -> None:
    files = HangFiles(tmp_path, "token", rank)
    files.write("{}")
    assert (tmp_path / "hangs" / "token" / file).read_text().startswith("{}\n")
