"""routing/rank_N.jsonl: what is read is whole, and steps that are made again are there once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.runlog.routing_record import ROUTING_FOLDER, RoutingLog, drop_other_ranks, read_routing
from gpt4moe.runlog.step_lines import StepLine
from gpt4moe.training.callback import History
from gpt4moe.training.callbacks.routing_record import RoutingRecord
from gpt4moe.training.state import TrainingContext


def line(step: int, rank: int, layer: int = 0, **other: object) -> StepLine:
    return {"step": step, "layer": layer, "rank": rank, "sources": 2, "top_k": 2, "tokens": [step, rank, 3], **other}


def record(folder: Path, *, first: int = 1, last: int = 3, ranks: int = 2) -> None:
    for rank in range(ranks):
        log = RoutingLog(folder, rank, first - 1)
        for step in range(first, last + 1):
            log.add([line(step, rank, sources=ranks)])
    drop_other_ranks(folder, ranks, first - 1)


def test_steps_that_are_made_again_are_there_once(tmp_path: Path) -> None:
    record(tmp_path)
    record(tmp_path, first=2, last=4)
    assert [it.step for it in read_routing(tmp_path)] == [1, 2, 3, 4]
    assert read_routing(tmp_path)[3].tokens == [[4, 0, 3], [4, 1, 3]]


def test_a_launch_on_fewer_ranks_leaves_no_later_line_of_the_others(tmp_path: Path) -> None:
    record(tmp_path)
    record(tmp_path, first=2, last=2, ranks=1)
    assert [len(it.tokens) for it in read_routing(tmp_path)] == [2, 1]


def test_a_launch_that_records_nothing_leaves_no_later_line_either(tmp_path: Path) -> None:
    """It makes these steps again, and a still later launch would take the old lines for theirs."""

    def start() -> None:
        for rank in range(2):
            context = SimpleNamespace(
                folder=SimpleNamespace(path=tmp_path), state=SimpleNamespace(step=1),
                groups=SimpleNamespace(rank=rank, is_first_rank=rank == 0, layout=SimpleNamespace(world_size=2)),
                run=SimpleNamespace(training=SimpleNamespace(record_routing=0)),
            )  # fmt: skip
            RoutingRecord().on_start(cast("TrainingContext", context), History())

    start()
    assert not list(tmp_path.iterdir())
    record(tmp_path, ranks=3)
    start()
    assert [it.step for it in read_routing(tmp_path)] == [1]


def test_a_line_that_a_kill_has_torn_is_made_again(tmp_path: Path) -> None:
    record(tmp_path)
    with (tmp_path / ROUTING_FOLDER / "rank_00001.jsonl").open("a") as file:
        file.write('{"step": 4, "la')
    record(tmp_path, first=4, last=4)
    assert [it.step for it in read_routing(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rank", "text", "cause"),
    [
        (1, None, "step 1, layer 0 has 1 lines of 2 ranks"),
        (1, json.dumps(line(1, 1)), "step 2, layer 0 has 1 lines of 2 ranks"),
        (1, json.dumps(line(1, 0)), "rank_00001.jsonl: a line is none"),
        (0, json.dumps(line(1, 0, tokens=[1, -2, 3])), "rank_00000.jsonl: a line is none"),
        (0, json.dumps(line(1, 0, top_k=0)), "rank_00000.jsonl: a line is none"),
        (0, json.dumps(line(1, 0, tokens="many")), "rank_00000.jsonl: a line is none"),
        (0, json.dumps(line(1, 0, tokens=[1, 2])), "or of several runs"),
        (0, "\n".join([json.dumps(line(1, 0))] * 2), "step 1, layer 0 has 3 lines"),
    ],
)
def test_a_record_with_holes_or_nonsense_is_refused(tmp_path: Path, rank: int, text: str | None, cause: str) -> None:
    record(tmp_path, last=2)
    path = tmp_path / ROUTING_FOLDER / f"rank_{rank:05}.jsonl"
    path.unlink() if text is None else path.write_text(text + "\n")
    with pytest.raises(DataError, match=cause):
        read_routing(tmp_path)


def test_a_run_without_a_record_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no recorded step") as error:
        read_routing(tmp_path)
    assert "training.record_routing" in error.value.cure


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.record_routing=-1 is negative"):
        TrainingConfig(steps=1, global_batch_size=1, record_routing=-1).validate()
    dense = ("model.moe=null", "model.ffn_hidden_size=64")
    with pytest.raises(ConfigError, match="record_routing=1, but tiny has no experts"):
        load_run_config(["+experiment=tiny", "run.name=record", "training.record_routing=1", *dense])
