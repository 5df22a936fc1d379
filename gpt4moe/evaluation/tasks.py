"""What training.evaluate_tasks names: read and checked before the run, asked at its checkpoints.

    x.jsonl        questions or texts, as tools/evaluate.py takes them; its first line tells which
    a data folder  its validation part
    another name   a task of lm-evaluation-harness

Each answers with one line: its name, its kind, and its numbers.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.evaluation import results
from gpt4moe.evaluation.corpus import SourceText, parts, read_sources, score_part
from gpt4moe.evaluation.questions import Examiner, Question, read_choices, read_exact
from gpt4moe.inference.load import LoadedModel
from gpt4moe.inference.text import Words
from gpt4moe.runlog.metrics import Record

ANSWER_TOKENS = 64
"""New tokens of an answer that must match, at most, as tools/evaluate.py has by default."""
SCORES = ("accuracy", "accuracy_normalised", "exact_match")
"""Numbers of questions that become metrics (results.of_answers)."""

Line = dict[str, Any]


class Task(Protocol):
    """One entry of training.evaluate_tasks."""

    @property
    def name(self) -> str:
        """Of its lines and metrics."""

    def ask(self, model: LoadedModel, words: Words) -> Line:
        """Its line, on rank 0. Collective over the world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileTask:
    """A jsonl file or a data folder."""

    name: str
    kind: str
    """choices, exact or texts."""
    questions: Sequence[Question] = ()
    sources: list[SourceText] = field(default_factory=list)

    def ask(self, model: LoadedModel, words: Words) -> Line:
        from gpt4moe.evaluation.scoring import Scorer

        scorer = Scorer(model.chunks, model.run, model.groups)
        lines = Examiner(scorer, model.run, words).answer(self.questions) if self.questions else []
        lines += [score_part(scorer, part) for part in parts(self.sources)]
        found = results.of_lines(lines, self.sources)
        return {"task": self.name, "kind": self.kind, **(found if self.sources else found[self.kind])}


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessTask:
    """A task, group or tag of lm-evaluation-harness."""

    name: str
    loaded: Any
    """evaluation.harness.LoadedTasks."""
    limit: int | None

    def ask(self, model: LoadedModel, words: Words) -> Line:
        from gpt4moe.evaluation.harness import run_loaded

        found = run_loaded(model, words, self.loaded, limit=self.limit)
        numbers = {
            task: {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
            for task, values in found.items()
        }
        return {"task": self.name, "kind": "lm-eval", "results": numbers}


def read_tasks(training: TrainingConfig, words: Words) -> list[Task]:
    """training.evaluate_tasks, in their order.

    Raises: ConfigError or DataError for one that is missing or damaged, does not fit the model, or has another's name.
    """
    found = [_read(entry, training, words) for entry in training.evaluate_tasks]
    names = [task.name for task in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(
            f"training.evaluate_tasks has {names.count(double)} tasks named {double!r}: a file has its name without "
            "its folder and ending.",
            "Rename one of them.",
        )
    return found


def metrics_of(lines: Sequence[Line]) -> Record:
    """task_score and task_loss of the lines (runlog.step_metrics)."""
    record: Record = {}
    for line in lines:
        name = line["task"]
        record |= {f"task_score/{name}/{score}": line[score] for score in SCORES if score in line}
        record |= {f"task_loss/{name}/{source['source']}": source["loss"] for source in line.get("sources", ())}
        record |= _harness_scores(name, line.get("results", {}))
    return record


def _harness_scores(name: str, found: dict[str, dict[str, float]]) -> Record:
    """A group's own numbers, or those of each task of a tag; no errors of measurement."""
    record: Record = {}
    for task, values in ({name: found[name]} if name in found else found).items():
        for key, value in values.items():
            metric, comma, answers_filter = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                shown = metric if answers_filter == "none" else key
                record[f"task_score/{task}/{shown}"] = value
    return record


def _read(entry: str, training: TrainingConfig, words: Words) -> Task:
    path = Path(entry)
    if path.is_dir():
        return FileTask(name=path.name, kind="texts", sources=read_sources(path, words, max_tokens=None))
    if path.is_file():
        return _read_file(path, training.evaluate_limit, words)
    if path.suffix or "/" in entry:
        raise DataError(
            f"training.evaluate_tasks names {entry}, which does not exist.",
            "Give a jsonl file, a data folder, or a task of lm-evaluation-harness.",
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"training.evaluate_tasks names {entry!r}: no file, and lm-evaluation-harness, which may have such a task, "
            "is not installed.",
            "Correct the path, or install it: pip install lm-eval==0.4.13 -c constraints.txt",
        )
    from gpt4moe.evaluation.harness import load_tasks

    include = training.evaluate_include_path
    loaded = load_tasks([entry], None if include is None else Path(include))
    return HarnessTask(name=entry, loaded=loaded, limit=training.evaluate_limit)


def _read_file(path: Path, limit: int | None, words: Words) -> FileTask:
    fields = _first_fields(path)
    if "choices" in fields:
        return FileTask(name=path.stem, kind="choices", questions=read_choices(path, words)[:limit])
    if "answer" in fields:
        return FileTask(name=path.stem, kind="exact", questions=read_exact(path, words, ANSWER_TOKENS)[:limit])
    if "text" in fields:
        return FileTask(name=path.stem, kind="texts", sources=read_sources(path, words, max_tokens=None))
    raise DataError(
        f"{path} of training.evaluate_tasks begins with no question and no text.",
        'Give lines {"prompt", "choices", "answer"}, {"prompt", "answer"} or {"text"} (docs/evaluation.md).',
    )


def _first_fields(path: Path) -> dict[str, Any]:
    """Of the first line that is not blank; empty when it is no JSON object."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
