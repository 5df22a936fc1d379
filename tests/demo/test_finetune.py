"""What `make sft` begins with, and the table it ends with."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from gpt4moe.demo import finetune
from gpt4moe.demo.finetune import Places, table_of


def examined(arithmetic: float, facts: float) -> dict[str, object]:
    kinds = {"arithmetic": (30, arithmetic), "facts": (10, facts)}
    return {
        "exact_match": (30 * arithmetic + 10 * facts) / 40,
        "kinds": {kind: {"number": number, "exact_match": share} for kind, (number, share) in kinds.items()},
    }


def test_the_table_has_a_row_for_each_kind_and_one_for_all() -> None:
    found = {"before": examined(0, 0.1), "full": examined(0.5, 1), "lora": examined(0.4, 0.9)}
    assert table_of(found) == [
        ["questions", "number", "before", "full", "lora"],
        ["arithmetic", "30", "0.0%", "50.0%", "40.0%"],
        ["facts", "10", "10.0%", "100.0%", "90.0%"],
        ["all", "40", "2.5%", "62.5%", "52.5%"],
    ]


def test_it_begins_with_the_newest_run_of_make_train_and_else_with_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(finetune, "_train", lambda console, name, *words, places: ran.append(name) or tmp_path / name)
    places, console = Places(runs=tmp_path), Console(file=io.StringIO())
    assert finetune._base(places, console) == tmp_path / "tiny-base" and ran == ["tiny-base"]
    for name in ("tiny-2", "tiny-4"):
        step = tmp_path / name / "checkpoints" / "step-00000200"
        step.mkdir(parents=True)
        (step / "manifest.json").write_text("{}")
    assert finetune._base(places, console) in (tmp_path / "tiny-2", tmp_path / "tiny-4") and len(ran) == 1
