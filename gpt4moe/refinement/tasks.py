"""Tasks, and what a candidate is drawn from: the task alone, or the task and the best candidate so far.

A line of tasks is {"id": 1, "prompt": "add 37+25="}, with any further fields (such as "answer") for a scorer to read.
"""

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.files import read_prompts

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
    """Raises: DataError with the first line that is no task."""
    prompts = read_prompts(path)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    chat = next((prompt.id for prompt in prompts if prompt.text is None), None)
    if chat is not None:
        raise DataError(
            f"{path}: the task {chat!r} has messages, but a template takes one text.",
            'Write {"id": 1, "prompt": "text"}; --chat puts every prompt into the chat template.',
        )
    return [
        Task(id=prompt.id, text=prompt.text or "", fields=json.loads(line))
        for prompt, line in zip(prompts, lines, strict=True)
    ]


def require_template(option: str, template: str, needed: str) -> None:
    """Raises: ConfigError when a template has braces or names that mean nothing, or lacks `{needed}`."""
    cure = f"Use {{{'}, {'.join(NAMES)}}}, double other braces, and name {{{needed}}} at least once."
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        template.format(**dict.fromkeys(NAMES, ""))
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{option} {template!r} is no template ({error}).", cure) from error
    if needed not in names:
        raise ConfigError(f"{option} {template!r} does not show {{{needed}}}.", cure)
