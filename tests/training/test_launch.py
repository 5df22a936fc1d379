"""What a launch reads, it reads once: files of a run grow with it, and file systems of clusters are slow to open."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gpt4moe.parallel.environment import Environment
from tests.numbered_lines import VOCABULARY
from tests.spawn import run_ranks
from tests.training.command import SMALL, metrics, run_rank, train


def test_every_file_that_grows_is_read_once_a_launch(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "x"
    keys = ("data=demo", f"data.path={corpus}", f"model.vocab_size={VOCABULARY}", "training.eval_samples=0")
    assert train(folder, *keys, "training.steps=2")[0].status == 0
    arguments = [*SMALL, f"run.root={tmp_path}", "run.name=x", *keys, "training.steps=3"]
    ((status, opened),) = run_ranks(1, counting_rank, arguments)
    assert status == 0
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3]
    files = [
        corpus / "manifest.json", corpus / "alpha" / "manifest.json", corpus / "tokenizer.json",
        folder / "metrics.jsonl", folder / "events.jsonl",
    ]  # fmt: skip
    assert {file: opened[str(file)] for file in files} == dict.fromkeys(files, 1)


def counting_rank(environment: Environment, arguments: list[str]) -> tuple[int, Counter[str]]:
    """The exit status, and how often each file was opened to be read; the report at the end, which reads what this
    launch has written, is left out."""
    from gpt4moe.pages import run_report

    opened: Counter[str] = Counter()

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(given[0], str | os.PathLike):
            return
        path, mode, flags = given
        if mode.startswith("r") and "+" not in mode if mode else flags & os.O_ACCMODE == os.O_RDONLY:
            opened[os.fspath(path)] += 1

    run_report.write_run_report = lambda folder: folder  # type: ignore[assignment]
    sys.addaudithook(note)
    return run_rank(environment, arguments, (), {}).status, opened
