"""`make vision`, all of it on a very small set; its examination and its table."""

import json
from pathlib import Path

import pytest

from gpt4moe.demo.pictures.items import KINDS, items
from gpt4moe.demo.seeing import Plan, _require_same_tokens, table_of, tell
from gpt4moe.demo.seeing_answers import Answers, wilson
from gpt4moe.demo.seeing_exam import shuffled
from gpt4moe.errors import LaunchError

SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=32",
    "training.steps=2", "schedule.total_steps=2", "schedule.warmup_steps=1", "checkpoint.every=2",
    "training.eval_samples=4", "tracking.wandb=disabled",
)  # fmt: skip


def test_all_of_it_runs_and_is_examined_and_is_not_done_twice(tmp_path: Path) -> None:
    few = dict.fromkeys(KINDS, 120)
    plan = Plan(
        drawn=tmp_path / "drawn", runs=tmp_path / "runs", learned=few, asked=dict.fromkeys(KINDS, 4), encoder_steps=2,
        processes=1, language=SMALL, vision=("model.vision.encoder.hidden_size=16",),
    )  # fmt: skip
    results = tell(plan, 0)
    run = tmp_path / "runs" / "tiny_vision-0"
    assert json.loads((run / "results.json").read_text()) == results
    assert set(results["kinds"]) == set(KINDS)
    for kind, ways in results["kinds"].items():
        assert set(ways) == {"seen", "shuffled", "closed"} | ({"no example"} if kind == "few_shot" else set())
        assert all(way["number"] == 4 and 0 <= way["low"] <= way["right"] <= way["high"] <= 1 for way in ways.values())
    page = (run / "report.html").read_text()
    assert "attributes: the whole answer" in page and page.count("data:image/png;base64,") == 1
    with pytest.raises(LaunchError, match="was not trained with"):
        _require_same_tokens(run.with_name("tiny_vision-text-0"), tmp_path / "drawn" / "items.jsonl")
    _require_same_tokens(run.with_name("tiny_vision-text-0"), tmp_path / "drawn" / "tokenizer.json")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) >= 3 and tell(plan, 0) == results
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_shuffled_items_have_another_items_pictures_and_their_own_question() -> None:
    some = list(items("attributes", 0, 5, is_held_out=True))
    others = shuffled(some)
    for item, other in zip(some, others, strict=True):
        assert (item.prompt, item.answer, item.fields) == (other.prompt, other.answer, other.fields)
        assert item.images[0][0].tobytes() != other.images[0][0].tobytes()
    assert {item.images[0][0].tobytes() for item in some} == {item.images[0][0].tobytes() for item in others}


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Brown, Cai, DasGupta 2001, by hand
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


def test_the_table_has_a_row_for_each_field_and_two_for_new_words() -> None:
    def of(*right: bool) -> Answers:
        return Answers(is_right=list(right), fields={"size": list(right)})

    ways = {"seen": of(True, True), "shuffled": of(True, False), "closed": of(False, False)}
    table = table_of({"attributes": ways, "few_shot": ways | {"no example": of(True, False)}})
    assert table[1:3] == [
        ["attributes: the whole answer", "2", "100.0%", "50.0%", "0.0%"],
        ["attributes: size", "2", "100.0%", "50.0%", "0.0%"],
    ]
    assert [row[0].rsplit(": ")[1] for row in table[3:]] == ["4 examples", "no example"]
    assert table[4][2].startswith("50.0% (")
