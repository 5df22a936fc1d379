"""The trace of a search as jsonl: a line of settings, then every candidate of round 0, of round 1, ... Resumed.

A line is appended whole as soon as its candidate is scored. After a kill, or a scorer that failed, the same command
goes on behind the last line. More --rounds than before go on too; other settings, tasks or weights are refused.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt4moe.errors import DataError, Gpt4MoeError
from gpt4moe.inference.files import AnswerFile, require_same_settings
from gpt4moe.refinement.search import Candidate, Course, Plan, as_line, from_line
from gpt4moe.refinement.tasks import Task

SETTINGS_ID = "settings"


def settings_of(plan: Plan, tasks: Sequence[Task], scorer: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What candidates follow from, the number of rounds left out. `weights` tell one model from another."""
    digest = hashlib.sha256(json.dumps([task.fields for task in tasks]).encode()).hexdigest()
    fields = {key: value for key, value in asdict(plan).items() if key != "rounds"}
    return {**fields, "stops": list(plan.stops), "scorer": scorer, **weights, "tasks": digest}


class Trace:
    """Open for appending, on the first rank.

    Raises: LaunchError when the file is in use or cannot be written; DataError when it is of other tasks or settings.
    """

    def __init__(self, path: Path, tasks: Sequence[Task], rounds: int, settings: dict[str, Any]):
        self.file = AnswerFile(path, [SETTINGS_ID, *([task.id for task in tasks] * rounds)])
        try:
            found = self.file.read()
            if not found:
                self.file.append([{"id": SETTINGS_ID, "settings": settings}])
            else:
                before, _ = _read(path, tasks, found)
                require_same_settings(path, before, settings)
        except Gpt4MoeError:
            self.file.close()
            raise
        self.candidates = found[1:]
        """Lines that were there already."""

    def append(self, course: Course, candidate: Candidate) -> None:
        self.file.append([as_line(course, candidate)])

    def close(self) -> None:
        self.file.close()


def read_trace(path: Path, tasks: Sequence[Task]) -> tuple[dict[str, Any], list[Course]]:
    """(settings, every task's candidates) of a finished trace. Raises: DataError when it is none of these tasks."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise _no_trace(path, error) from error
    return _read(path, tasks, lines)


def _read(path: Path, tasks: Sequence[Task], lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[Course]]:
    """(settings, courses) of a trace's lines. Raises: DataError when they are none."""
    try:
        first, *rest = lines
        courses = courses_of(tasks, rest)
        settings: dict[str, Any] = dict(first["settings"])
        odd = next((line for line in rest if not math.isfinite(line["score"])), None)
        if odd is not None:
            raise ValueError(f"task {odd['id']!r} has the score {odd['score']}")
    except (ValueError, KeyError, TypeError) as error:
        raise _no_trace(path, error) from error
    return settings, courses


def _no_trace(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is no trace of these tasks ({error}).", "Make it with tools/refine.py, in another --output."
    )


def courses_of(tasks: Sequence[Task], lines: Sequence[dict[str, Any]]) -> list[Course]:
    """Tasks with the candidates of a trace's lines."""
    courses = {task.id: Course(task) for task in tasks}
    for line in lines:
        courses[line["id"]].candidates.append(from_line(line))
    return list(courses.values())
