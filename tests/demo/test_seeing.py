"""`make vision`, all of it on a very small set; its examination and its table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gpt4moe.config.checksums import file_sha256
from gpt4moe.demo import seeing
from gpt4moe.demo.made_of import mark_of
from gpt4moe.demo.pictures.items import KINDS, fields_denied, items
from gpt4moe.demo.pictures.make import ASKED
from gpt4moe.demo.seeing import Plan, _require_same_tokens, table_of, tell
from gpt4moe.demo.seeing_answers import Answers, wilson
from gpt4moe.demo.seeing_exam import constant, shuffled
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
    encoder = tmp_path / "drawn" / "encoder-0"
    assert results["encoder_sha256"] == file_sha256(encoder / "model.safetensors")
    assert results["base_sha256"] == file_sha256(Path(results["base"]) / "manifest.json")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) >= 3 and tell(plan, 0) == results
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    refuses_what_was_made_of_something_else(plan, run, encoder)
    assert (run / "results.json").stat().st_mtime_ns > max(before.values())


def refuses_what_was_made_of_something_else(plan: Plan, run: Path, encoder: Path) -> None:
    text_run, text = run.with_name("tiny_vision-text-0"), plan.drawn / "text"
    with pytest.raises(LaunchError, match=r"tiny_vision-0 was made with settings.optimizer.lr 0.002, not 0.003"):
        tell(replace(plan, stage=("optimizer.lr=0.003",)), 0)
    with pytest.raises(LaunchError, match=r"tiny_vision-text-0 was made with settings.optimizer.lr 0.0015, not 0.003"):
        tell(replace(plan, text=("optimizer.lr=0.003",)), 0)
    with pytest.raises(LaunchError, match=r"encoder-0 was made with course.steps 2, not 3"):
        tell(replace(plan, encoder_steps=3), 0)
    other = shutil.copytree(text_run, run.with_name("other"))
    manifest = next(other.rglob("step-*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256":  "', 1))
    with pytest.raises(LaunchError, match="tiny_vision-0 was made with base_sha256"):
        seeing._learn_to_see(plan, 0, other, seeing._parts(plan, 0, other), seeing.Console(quiet=True))
    weights = load_file(encoder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LaunchError, match="tiny_vision-0 was made with encoder_sha256") as raised:
        tell(plan, 0)
    assert raised.value.cure.startswith(f"Delete {run} ")
    mark_of(text).unlink()
    with pytest.raises(LaunchError, match="text is there, but"):
        tell(plan, 0)


def test_ctrl_c_ends_it_in_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(plan: Plan, seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(seeing, "tell", stopped)
    assert seeing.main([]) == 130
    assert capsys.readouterr().err.startswith("error: Stopped by Ctrl-C.")


@pytest.mark.parametrize("kind", list(KINDS))
def test_shuffled_pictures_deny_every_field_of_the_answer(kind: str) -> None:
    some = list(items(kind, 0, ASKED[kind], "asked"))
    at = {id(item.images): item for item in some}
    others = shuffled(some)
    for item, other in zip(some, others, strict=True):
        assert (item.prompt, item.answer, item.fields) == (other.prompt, other.answer, other.fields)
        partner = at[id(other.images)]
        if kind == "relations":
            first, second = partner.text.split()[1:4], partner.text.rstrip(".").split()[-3:]
            for value, *seen in zip(item.text.rstrip(".").split()[-3:], first, second, strict=True):
                assert value not in seen
            upright = {"above", "below"}
            assert (item.fields["relation"] in upright) != (partner.fields["relation"] in upright)
        else:
            assert all(partner.fields[name] != value for name, value in item.fields.items())
        assert fields_denied(item, item) == 0


def test_a_constant_answer_gets_the_share_of_the_most_frequent_one() -> None:
    of = {(item.fields["size"], item.fields["place"]): item for item in items("attributes", 0, 200, "asked")}
    some = [of["small", "above"], of["small", "left of"], of["large", "above"], of["small", "above"]]
    found = constant(some)
    assert (found["keys"], found["right"]) == (3, 0.5)
    assert (found["fields"]["size"], found["fields"]["place"]) == (0.75, 0.75)


def test_no_constant_answer_gets_far_in_attributes_and_clips() -> None:
    for kind in ("attributes", "clips"):
        some = list(items(kind, 0, ASKED[kind], "asked"))
        for name, share in constant(some)["fields"].items():
            # Of 20 clips four have one colour, and 200 draws of them scatter.
            assert share < 1.7 / len({item.fields[name] for item in some})


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Brown, Cai, DasGupta 2001, by hand
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


def test_the_table_has_a_row_for_each_field_and_two_for_new_words() -> None:
    def of(*right: bool) -> Answers:
        return Answers(is_right=list(right), fields={"size": list(right)})

    ways = {"seen": of(True, True), "shuffled": of(True, False), "closed": of(False, False)}
    constants = {kind: {"keys": 2, "right": 0.5, "fields": {"size": 0.75}} for kind in ("attributes", "few_shot")}
    table = table_of({"attributes": ways, "few_shot": ways | {"no example": of(True, False)}}, constants)
    assert table[1:3] == [
        ["attributes: the whole answer", "2", "2", "100.0%", "50.0%", "0.0%", "50.0%"],
        ["attributes: size", "2", "2", "100.0%", "50.0%", "0.0%", "75.0%"],
    ]
    assert [row[0].rsplit(": ")[1] for row in table[3:]] == ["4 examples", "no example"]
    assert table[4][3].startswith("50.0% (") and {len(row) for row in table} == {7}
    assert table[3][5].startswith("0.0% (0% to ")
