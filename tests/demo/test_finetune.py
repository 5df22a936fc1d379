"""What `make sft` begins with, and the table it ends with."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.config.checksums import file_sha256
from gpt4moe.demo import finetune
from gpt4moe.demo.finetune import Places, table_of
from gpt4moe.errors import DataError, LaunchError


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


def test_the_runs_go_side_by_side_and_a_failed_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, console = Places(runs=tmp_path), Console(file=io.StringIO())
    meet = (
        "import time; from pathlib import Path; Path(r'{0}/{1}').touch()\n"
        "while not Path(r'{0}/{2}').exists(): time.sleep(.01)"
    )

    def words(name: str, overrides: tuple[str, ...], places: Places) -> list[str]:
        mine, other = ("full", "lora") if name == "tiny_sft-full" else ("lora", "full")
        return ["-c", meet.format(tmp_path, mine, other)]

    monkeypatch.setattr(finetune, "_words", words)
    assert finetune._tuned(tmp_path, places, console) == {
        name: tmp_path / f"tiny_sft-{name}" for name in ("full", "lora")
    }
    monkeypatch.setattr(finetune, "_words", lambda name, *_: ["-c", f"print('bad'); exit({int('lora' in name)})"])
    with pytest.raises(LaunchError, match=r"lora\.log ended with status 1"):
        finetune._tuned(tmp_path, places, console)
    assert (tmp_path / "tiny_sft-lora.log").read_text() == "bad\n"


def test_what_it_begins_with_is_checked_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "manifest.json").touch()
    places = Places(base=tmp_path, text=tmp_path)
    for tokenizer in (file_sha256(tmp_path / "tokenizer.json"), "of other text"):
        monkeypatch.setattr(Manifest, "load", lambda _, name=tokenizer: SimpleNamespace(identity={"tokenizer": name}))
        if tokenizer == "of other text":
            with pytest.raises(LaunchError, match="was not trained with"):
                finetune._base(places, console)
        else:
            assert finetune._base(places, console) == tmp_path
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        finetune._base(Places(runs=tmp_path, text=tmp_path / "none"), console)


def test_runs_of_another_base_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    places = Places(runs=tmp_path, chat=tmp_path)
    for _ in range(2):
        finetune._require_same_base(places, tmp_path / "tiny-4" / "step-00000200")
    with pytest.raises(LaunchError, match="were begun from"):
        finetune._require_same_base(places, tmp_path / "tiny-8" / "step-00000200")


def test_ctrl_c_ends_it_in_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(places: Places) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "tell", stopped)
    assert finetune.main([]) == 130
    assert capsys.readouterr().err.startswith("error: Stopped by Ctrl-C.")
