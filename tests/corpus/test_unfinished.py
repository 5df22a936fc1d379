"""One command at a time writes a source, and none removes the work of another."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.corpus import build, unfinished
from gpt4moe.corpus.unfinished import locked
from gpt4moe.data.manifest import SourceManifest
from gpt4moe.errors import DataError
from tests.corpus.conftest import TEXTS, write_lines

Make = Callable[..., int]


def test_two_extensions_at_once_are_not_lost(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate("abc"):
        write_lines(tmp_path / f"{name}.jsonl", TEXTS[100 * number : 100 * number + 100])
    assert make(f"--source=a={tmp_path}/a.jsonl") == 0
    monkeypatch.setattr(unfinished, "_LOCK_SECONDS", 0.0)
    require_older_files, other = build.require_older_files, []

    def meanwhile(*given: object) -> None:
        require_older_files(*given)  # type: ignore[arg-type]
        if not other:
            other.append(0)
            other[0] = make(f"--extend=a={tmp_path}/c.jsonl")

    monkeypatch.setattr(build, "require_older_files", meanwhile)
    assert make(f"--extend=a={tmp_path}/b.jsonl") == 0
    assert other == [2]
    assert "Another command is writing" in capsys.readouterr().err
    assert make(f"--extend=a={tmp_path}/c.jsonl") == 0
    manifest = SourceManifest.read(tmp_path / "out" / "a")
    assert manifest.num_documents("train") + manifest.num_documents("valid") == 300


def test_a_source_that_is_made_already_leaves_the_work_of_a_running_command(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={tmp_path}/a.jsonl") == 0
    monkeypatch.setattr(unfinished, "_LOCK_SECONDS", 0.0)
    work = tmp_path / "out" / ".a.work"
    with locked(work):
        (work / "piece-000000.json").write_text("of the other command")
        assert make(f"--source=a={tmp_path}/a.jsonl") == 2
        assert (work / "piece-000000.json").exists()
    assert make(f"--source=a={tmp_path}/a.jsonl") == 0
    assert not work.exists()


def test_a_lock_that_was_removed_while_a_command_waited_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, is_locked, is_over = tmp_path / "work", threading.Event(), threading.Event()

    def wait() -> None:
        with locked(work):
            is_locked.set()
            is_over.wait(10)

    waiting = threading.Thread(target=wait)
    with locked(work):
        waiting.start()
        assert not is_locked.wait(0.3)
    assert is_locked.wait(10)
    monkeypatch.setattr(unfinished, "_LOCK_SECONDS", 0.0)
    with pytest.raises(DataError, match="Another command"), locked(work):
        pass
    is_over.set()
    waiting.join()
    assert not work.exists()
