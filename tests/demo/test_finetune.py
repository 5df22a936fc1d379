"""What `make sft` begins with, and the table it ends with."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.data.manifest import file_sha256
from gpt4moe.demo import finetune
from gpt4moe.demo.finetune import Places, table_of
from gpt4moe.errors import LaunchError


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
    text, chat = tmp_path / "text", tmp_path / "chat"
    for folder in (text, chat):
        folder.mkdir()
    (text / "tokenizer.json").write_text("{}")
    ours = file_sha256(text / "tokenizer.json")
    monkeypatch.setattr(
        Manifest, "load", lambda folder: SimpleNamespace(identity={"tokenizer": (folder / "manifest.json").read_text()})
    )
    places, console = Places(runs=tmp_path, text=text, chat=chat), Console(file=io.StringIO())
    assert finetune._base(places, console) == tmp_path / "tiny-base" and ran == ["tiny-base"]
    for number, (name, tokenizer) in enumerate({"tiny-2": ours, "tiny-4": ours, "tiny-1": "of other text"}.items()):
        step = tmp_path / name / "checkpoints" / "step-00000200"
        step.mkdir(parents=True)
        (step / "manifest.json").write_text(tokenizer)
        os.utime(step, (number, number))
    assert finetune._base(places, console) == tmp_path / "tiny-4" and len(ran) == 1


def test_runs_of_another_base_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    places = Places(runs=tmp_path, chat=tmp_path)
    for _ in range(2):
        finetune._require_same_base(places, tmp_path / "tiny-4" / "step-00000200")
    with pytest.raises(LaunchError, match="were begun from"):
        finetune._require_same_base(places, tmp_path / "tiny-8" / "step-00000200")
