"""Bit-equal whatever the processes, pieces and restarts; kill -9 loses nothing; the same order is not made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.corpus import build, command, inputs, sample
from gpt4moe.data.manifest import SourceManifest
from gpt4moe.errors import DataError
from tests.corpus.conftest import TEXTS, files_of, write_lines

Make = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--held-out=0.1 --deduplicate --fim=a=0.5 --decontaminate={evaluation} --decontaminate-words=5 --source=a={text}"
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every step on: duplicates far apart, an evaluation file, fill-in-the-middle."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [f"{text} {'many words ' * 40}" for text in TEXTS] * 2 + [f"{text}  {'many words ' * 40}" for text in TEXTS]
    write_lines(folder / "a.jsonl", texts)
    (folder / "evaluation.txt").write_text("document 7 of other things\n")
    return SMALL.format(text=folder / "a.jsonl", evaluation=folder / "evaluation.txt").split()


def small(monkeypatch: pytest.MonkeyPatch, piece_bytes: int, shard_bytes: int = 20_000) -> None:
    monkeypatch.setattr(inputs, "_PIECE_BYTES", (piece_bytes, piece_bytes))
    order = command.Order
    monkeypatch.setattr(command, "Order", lambda **given: order(**given, shard_bytes=shard_bytes))


@pytest.fixture(scope="module")
def expected(arguments: list[str], tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the source, made in one process of pieces of 30 kB."""
    from tools.tokenize_corpus import main

    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as monkeypatch:
        small(monkeypatch, 30_000)
        assert main([f"--out={out}", f"--tokenizer={tokenizer_path}", *arguments]) == 0
    return files_of(out / "a")


def test_several_shards_hold_the_documents_once_and_say_what_was_removed(
    expected: dict[str, bytes], arguments: list[str], tmp_path: Path
) -> None:
    assert len([name for name in expected if name.startswith("train") and name.endswith(".bin")]) > 3
    (tmp_path / "manifest.json").write_bytes(expected["manifest.json"])
    text = SourceManifest.read(tmp_path).text
    assert text is not None
    assert text["removed"] == {"contaminated": 3, "duplicates": 798}
    assert sum(text["documents"].values()) == len(TEXTS) - 1
    # Of the documents that stay alone: the first 400 without number 7.
    assert sum(text["bytes"].values()) == sum(len(f"{t} {'many words ' * 40}".encode()) for t in TEXTS if t != TEXTS[7])
    assert sum(text["bytes_read"].values()) > 2.9 * sum(text["bytes"].values())
    assert 140 < text["middle_last"] < 220
    assert expected["contaminated.jsonl"].count(b"evaluation.txt:1") == 3


def test_processes_do_not_change_a_byte(
    make: Make, expected: dict[str, bytes], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 30_000)
    assert make(*arguments, "--processes=3") == 0
    assert files_of(tmp_path / "out" / "a") == expected


def test_the_size_of_pieces_changes_no_token(
    make: Make, expected: dict[str, bytes], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 1_000_000)
    assert make(*arguments) == 0
    found = files_of(tmp_path / "out" / "a")
    assert {name: data for name, data in found.items() if name != "manifest.json"} == {
        name: data for name, data in expected.items() if name != "manifest.json"
    }


KILLED = """
import sys
sys.path.insert(0, {root!r})
if __name__ == "__main__":
    from gpt4moe.corpus import build, command, inputs, sample
    inputs._PIECE_BYTES = (30_000, 30_000)
    order = command.Order
    command.Order = lambda **given: order(**given, shard_bytes=20_000)
    from tools.tokenize_corpus import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_at_any_stage_loses_and_doubles_nothing(
    expected: dict[str, bytes], arguments: list[str], tokenizer_path: Path, tmp_path: Path, processes: int
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    out, work = tmp_path / "out", tmp_path / "out" / ".a.work"
    words = [f"--out={out}", f"--tokenizer={tokenizer_path}", f"--processes={processes}", *arguments]
    killed = 0
    for pattern, count in (("piece-*.json", 1), ("piece-*.json", 9), ("shard-train-*.json", 2)):
        running = subprocess.Popen([sys.executable, str(script), *words], stderr=subprocess.DEVNULL)
        while running.poll() is None and len(list(work.glob(pattern))) < count:
            time.sleep(0.001)
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
            killed += 1
        running.wait()
        assert not (out / "manifest.json").exists() or not killed
    assert killed == 3
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert files_of(out / "a") == expected
    assert sorted(path.name for path in out.iterdir()) == ["a", "manifest.json", "tokenizer.json"]


def test_the_same_order_is_not_made_twice_unless_a_file_is_damaged(
    make: Make, arguments: list[str], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small(monkeypatch, 30_000)
    assert make(*arguments) == 0
    assert make(*arguments) == 0
    assert "made already" in capsys.readouterr().err
    path = tmp_path / "out" / "a" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert make(*arguments) == 0
    assert "made already" not in capsys.readouterr().err
    assert files_of(tmp_path / "out" / "a") == expected
    assert make(*arguments, "--seed=2") == 0
    assert files_of(tmp_path / "out" / "a") != expected


def test_a_mended_file_costs_its_own_pieces_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch, 5000)
    monkeypatch.setattr(sample, "_PLACE_BYTES", 1)
    files = [write_lines(tmp_path / f"{number}.jsonl", TEXTS[number::3]) for number in range(3)]
    good = files[1].read_bytes()
    files[1].write_bytes(good + b'{"text": 7}\n')
    given = ["--source=a=" + ",".join(map(str, files)), "--held-out=0.1"]
    assert make(*given) == 2
    line = good.count(b"\n") + 1
    assert f"{files[1]}:{line}: 'text' is of type int" in capsys.readouterr().err
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".a.work").glob("piece-*.json")}
    assert before
    files[1].write_bytes(good)
    made = []
    make_piece = build.make_piece
    monkeypatch.setattr(build, "make_piece", lambda path, *rest: (made.append(path.name), make_piece(path, *rest)))
    assert make(*given) == 0
    assert set(made).isdisjoint(sorted(before)[:2])
    manifest = SourceManifest.read(tmp_path / "out" / "a")
    assert manifest.num_documents("train") + manifest.num_documents("valid") == len(TEXTS)


def test_a_file_that_changes_while_it_is_read_is_refused_and_its_pieces_alone_are_made_anew(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch, 5000)
    files = [write_lines(tmp_path / f"{number}.jsonl", TEXTS[number::2]) for number in range(2)]
    make_piece, made = build.make_piece, []

    def changed(path: Path, *rest: object) -> None:
        make_piece(path, *rest)  # type: ignore[arg-type]
        if not made:
            files[1].write_text(files[1].read_text().replace("document 1 ", "document 9 "))
        made.append(path.name)

    monkeypatch.setattr(build, "make_piece", changed)
    given = ["--source=a=" + ",".join(map(str, files)), "--held-out=0.1"]
    assert make(*given) == 2
    assert f"{files[1]} was changed while this command read it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a").exists()
    first = len(made)
    assert make(*given) == 0
    assert 0 < len(made) - first < first


def test_work_goes_on_where_the_tokenizer_was_moved(
    make: Make, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small(monkeypatch, 5000)
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    moved = tmp_path / "moved.json"
    moved.write_bytes(tokenizer_path.read_bytes())
    with monkeypatch.context() as broken:
        broken.setattr(build, "require_language", lambda *_: (_ for _ in ()).throw(DataError("ended", "go on")))
        assert make(f"--source=a={path}") == 2
    assert make(f"--source=a={path}", f"--tokenizer={moved}") == 0
    assert "pieces are finished" in capsys.readouterr().err


def test_pieces_without_one_of_their_files_are_made_anew_as_after_a_power_failure(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, 5000)
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={path}", f"--out={tmp_path / 'whole'}") == 0
    with monkeypatch.context() as broken:
        broken.setattr(build, "plan_shards", lambda *_, **__: (_ for _ in ()).throw(DataError("ended", "go on")))
        assert make(f"--source=a={path}") == 2
    work = tmp_path / "out" / ".a.work"
    (work / "piece-000001.train.tokens").write_bytes(b"")
    (work / "piece-000002.json").write_bytes(b"")
    (work / "piece-000003.train.lengths").write_bytes(b"")  # whose documents would be lost in silence
    (work / "piece-000004.counts").unlink()
    assert make(f"--source=a={path}") == 0
    assert files_of(tmp_path / "out" / "a") == files_of(tmp_path / "whole" / "a")


@pytest.mark.parametrize("option", ["", "--deduplicate"])
def test_shards_that_lost_documents_are_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*TEXTS, TEXTS[0]])
    given = [f"--source=a={path}", "--held-out=0.1", *option.split()]
    with monkeypatch.context() as broken:
        broken.setattr(build, "commit", lambda *_: (_ for _ in ()).throw(DataError("ended", "go on")))
        assert make(*given) == 2
    shard = tmp_path / "out" / ".a.work" / "shard-train-00000.json"
    found = json.loads(shard.read_text())
    shard.write_text(json.dumps({**found, "documents": found["documents"] - 1}))
    assert make(*given) == 2
    assert "401 documents were read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a").exists()
