"""Tasks, and what a candidate is drawn from: the task alone, or the task and the best candidate so far.

A line of tasks is {"id": 1, "prompt": "add 37+25="}, with any further fields (such as "answer") for a scorer to read.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.data.lines import read_lines, require_own_ids
from gpt4moe.errors import ConfigError, DataError

FIRST_TEMPLATE = "{task}"
DEFAULT_TEMPLATE = "{task}{best}\n{task}"
"""The best so far as if it were given, then the task again: right for a model that only continues texts."""
NAMES = ("task", "best", "score", "round")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A line of tasks."""

    id: str | int
    text: str
    fields: dict[str, Any]
    """The whole line."""

    @property
    def answer(self) -> str | None:
        """The right answer, where the line has one."""
        return str(self.fields["answer"]).strip() if "answer" in self.fields else None


def read_tasks(path: Path) -> list[Task]:
    """Raises: DataError with the first line that is no task, or has images: a model would answer as one without."""
    lines = read_lines(path, {"prompt": str}, needed=("prompt",), example='{"id": 1, "prompt": "text"}')
    require_own_ids(path, lines)
    for line in lines:
        if not line["prompt"]:
            raise DataError(f"{path}, line {line['line']} has an empty prompt.", "Write a task, or leave the line out.")
        if line["whole"].get("images"):
            raise DataError(
                f"{path}, line {line['line']} has images, and tasks are read as text alone.",
                "Leave them out, or ask with tools/generate.py --input, which reads images.",
            )
    return [Task(id=line["id"], text=line["prompt"], fields=line["whole"]) for line in lines]


def require_text(option: str, text: str) -> None:
    """Raises: ConfigError for bytes of a command line that are no UTF-8: no tokenizer and no file takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{option} {text!r} is no UTF-8.", "Give whole characters, in UTF-8.") from error


def require_template(option: str, template: str, needed: str) -> None:
    """Raises: ConfigError when a template has anything in braces but a plain name of NAMES, or lacks `{needed}`."""
    require_text(option, template)
    cure = f"Use {{{'}, {'.join(NAMES)}}} as they stand here, double other braces, and name {{{needed}}} at least once."
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ConfigError(f"{option} {template!r} is no template ({error}).", cure) from error
    names = [name for _, name, _, _ in fields]
    for _, name, width, conversion in fields:
        # A width could ask for any memory, and {task.x} or {task!r} for what no reader of a template expects.
        if name not in NAMES or width or conversion:
            shown = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if width else ''}{width}"
            raise ConfigError(f"{option} {template!r} is no template ({{{shown}}}).", cure)
    if needed not in names:
        raise ConfigError(f"{option} {template!r} does not show {{{needed}}}.", cure)
