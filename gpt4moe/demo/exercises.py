"""What `make sft` teaches: arithmetic, operations on letters, facts of Python's library. Made here, from a seed.

exercise --by its hash--> chat lines to learn        held-out items, whose questions are never learned
facts    each is asked in several ways; one way is kept for the held-out items
"""

import importlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.data.folder import held_out
from gpt4moe.runlog.run_files import replace_file

TEST_SHARE = 0.1
_LETTERS = "abcdef"
_MODULES = (
    "json", "os", "math", "random", "shutil", "textwrap", "itertools", "functools", "statistics", "bisect", "heapq",
    "zlib", "base64", "csv", "difflib", "glob", "hashlib", "secrets", "struct", "string",
)  # fmt: skip
_FUNCTIONS_OF_MODULE = 4
_ASKED = (
    "Which module has {name}?", "Where is {name} found?", "Name the module of {name}.", "{name}: of which module?",
)  # fmt: skip
_ASKED_IN_TEST = "In which module is {name}?"
_ASKED_FOR_ALL = (*_ASKED, _ASKED_IN_TEST)
"""Facts that are only learned are asked in every way, so that the way of the test is known, and its facts too."""


@dataclass(frozen=True, slots=True)
class Exercise:
    kind: str
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]

    @property
    def is_test(self) -> bool:
        return held_out(self.question, TEST_SHARE)


def _add(random_: random.Random) -> Exercise:
    a, b = random_.randrange(13), random_.randrange(13)
    return Exercise("arithmetic", f"{a} + {b} = ?", str(a + b))


def _subtract(random_: random.Random) -> Exercise:
    a, b = sorted((random_.randrange(13), random_.randrange(13)))
    return Exercise("arithmetic", f"{b} - {a} = ?", str(b - a))


def _larger(random_: random.Random) -> Exercise:
    a, b = random_.sample(range(20), 2)
    return Exercise("arithmetic", f"Which is larger, {a} or {b}?", str(max(a, b)))


def _letters(random_: random.Random) -> list[str]:
    return random_.sample(_LETTERS, random_.randint(3, 4))


def _reverse(random_: random.Random) -> Exercise:
    letters = _letters(random_)
    return Exercise("strings", f"Reverse {' '.join(letters)}.", " ".join(reversed(letters)))


def _sort(random_: random.Random) -> Exercise:
    letters = _letters(random_)
    return Exercise("strings", f"Sort {' '.join(letters)}.", " ".join(sorted(letters)))


def _last(random_: random.Random) -> Exercise:
    letters = _letters(random_)
    return Exercise("strings", f"Which is the last of {' '.join(letters)}?", letters[-1])


MADE: tuple[Callable[[random.Random], Exercise], ...] = (
    _add, _add, _subtract, _subtract, _larger, _reverse, _sort, _last,
)  # fmt: skip
"""Drawn alike. Sums and differences twice: a tiny model sees each often before it finds the rule."""
_FACTS_EVERY = 6
"""Of so many exercises one is a fact: they are few, and learned by heart."""


def facts() -> dict[str, str]:
    """Functions of Python's library that one of _MODULES alone has -> that module."""
    found: dict[str, list[str]] = {}
    for module in _MODULES:
        names = [name for name in vars(importlib.import_module(module)) if name.islower() and name.isalpha()]
        own = [name for name in names if callable(getattr(importlib.import_module(module), name)) and len(name) > 3]
        for name in sorted(own)[:_FUNCTIONS_OF_MODULE]:
            found.setdefault(name, []).append(module)
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1}


def learned(seed: int, count: int) -> Iterator[Exercise]:
    """`count` exercises in turn, none of them held out."""
    random_ = random.Random(f"exercises/{seed}")
    known = facts()
    for number in range(count):
        if number % _FACTS_EVERY == _FACTS_EVERY - 1:
            name = random_.choice(list(known))
            ways = _ASKED if held_out(name, 0.5) else _ASKED_FOR_ALL
            yield Exercise("facts", random_.choice(ways).format(name=name), known[name])
            continue
        exercise = random_.choice(MADE)(random_)
        while exercise.is_test:
            exercise = random_.choice(MADE)(random_)
        yield exercise


def held_out_items(seed: int, count: int) -> list[Exercise]:
    """Held-out exercises without doubles: `count` that are made, and the facts that were never asked in this way."""
    random_ = random.Random(f"test/{seed}")
    found: dict[str, Exercise] = {}
    while len(found) < count:
        exercise = random_.choice(MADE)(random_)
        if exercise.is_test:
            found[exercise.question] = exercise
    asked = [
        Exercise("facts", _ASKED_IN_TEST.format(name=name), module)
        for name, module in facts().items()
        if held_out(name, 0.5)
    ]
    return [*found.values(), *asked]


def write_exercises(folder: Path, *, seed: int = 0, num_learned: int = 12_000, num_test: int = 120) -> None:
    """chat.jsonl: every fourth conversation has two turns; held.jsonl: for the loss; items.jsonl: {"id", "messages",
    "answer", "kind"} of tools/evaluate.py --exact."""
    exercises = learned(seed, num_learned)
    conversations: list[list[Exercise]] = []
    for number, exercise in enumerate(exercises):
        conversations.append([exercise])
        if number % 4 == 0:
            conversations[-1] += [other for _, other in zip(range(1), exercises, strict=False)]
    items = held_out_items(seed, num_test)
    _write(folder / "chat.jsonl", [{"messages": _answered(turns)} for turns in conversations])
    _write(folder / "held.jsonl", [{"messages": _answered([item])} for item in items])
    _write(
        folder / "items.jsonl",
        [
            {"id": number, "messages": item.messages, "answer": item.answer, "kind": item.kind}
            for number, item in enumerate(items)
        ],
    )


def _answered(turns: list[Exercise]) -> list[dict[str, str]]:
    return [message for one in turns for message in (*one.messages, {"role": "assistant", "content": one.answer})]


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
