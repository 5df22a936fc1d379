"""A set whose answers can be checked: two-digit arithmetic and operations on short strings, made from a seed.

    add 37+25=62    sub 62-25=37    mul 12*7=84    rev abcd=dcba    sort dbca=abcd

    every task --by its hash--> train: documents of a data folder        test: tasks.jsonl, never trained on

A document is a task with its answer, or a task with an earlier attempt and then the answer, as DEFAULT_TEMPLATE writes
it: `add 37+25=52\\nadd 37+25=62\\n`. Half of those attempts are wrong, so that a model can learn to mend and to keep.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.data.folder import held_out
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from gpt4moe.refinement.tasks import DEFAULT_TEMPLATE
from gpt4moe.runlog.run_files import replace_file

TEST_SHARE = 0.1
"""Of all tasks; chosen by hash, so the split is the same for every seed."""
LETTERS = "abcdefgh"


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    """As far as the answer."""
    answer: str

    @property
    def is_test(self) -> bool:
        return held_out(self.text, TEST_SHARE)


def _numbers(random_: random.Random, lowest: int = 10, highest: int = 99) -> tuple[int, int]:
    return random_.randint(10, 99), random_.randint(lowest, highest)


def _letters(random_: random.Random) -> str:
    return "".join(random_.sample(LETTERS, random_.randint(4, 6)))


def _add(random_: random.Random) -> tuple[str, str]:
    a, b = _numbers(random_)
    return f"add {a}+{b}=", str(a + b)


def _subtract(random_: random.Random) -> tuple[str, str]:
    a, b = _numbers(random_)
    return f"sub {a}-{b}=", str(a - b)


def _multiply(random_: random.Random) -> tuple[str, str]:
    a, b = _numbers(random_, 2, 9)
    return f"mul {a}*{b}=", str(a * b)


def _reverse(random_: random.Random) -> tuple[str, str]:
    letters = _letters(random_)
    return f"rev {letters}=", letters[::-1]


def _sort(random_: random.Random) -> tuple[str, str]:
    letters = _letters(random_)
    return f"sort {letters}=", "".join(sorted(letters))


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add, "subtract": _subtract, "multiply": _multiply, "reverse": _reverse, "sort": _sort,
}  # fmt: skip


def questions(seed: int, *, is_test: bool) -> Iterator[Question]:
    """Without end, kinds in turn, of one side of the split."""
    random_ = random.Random(f"checkable/{seed}/{is_test}")
    while True:
        for kind, make in KINDS.items():
            question = Question(kind, *make(random_))
            while question.is_test != is_test:
                question = Question(kind, *make(random_))
            yield question


def documents(seed: int, count: int, *, is_test: bool) -> Iterator[str]:
    """Texts to train on, every second one with an earlier attempt."""
    random_ = random.Random(f"documents/{seed}/{is_test}")
    for number, question in zip(range(count), questions(seed, is_test=is_test), strict=False):
        before = question.text
        if number % 2:
            attempt = question.answer if random_.random() < 0.5 else wrong_answer(question.answer, random_)
            before = DEFAULT_TEMPLATE.format(task=question.text, best=attempt)
        yield f"{before}{question.answer}\n"


def wrong_answer(answer: str, random_: random.Random) -> str:
    """The answer with one character replaced by another one of its kind."""
    at = random_.randrange(len(answer))
    letters = LETTERS if answer[at].isalpha() else "0123456789"
    return answer[:at] + random_.choice([one for one in letters if one != answer[at]]) + answer[at + 1 :]


def write_set(folder: Path, *, seed: int = 0, num_train: int = 40_000, num_test: int = 200) -> None:
    """Writes a data folder to train on, and tasks.jsonl: lines {"id", "prompt", "answer", "kind"} without doubles.

    Args:
        num_train: documents; num_test: tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "bytes.json"
    train_tokenizer(documents(seed, 100, is_test=False), vocab_size=SMALLEST_VOCABULARY).backend.save(str(tokenizer))
    source = SourceText(
        train=documents(seed, num_train, is_test=False), valid=documents(seed, 1000, is_test=True),
        licence="CC0-1.0", description=f"two-digit arithmetic and string operations, seed {seed}",
    )  # fmt: skip
    write_data_folder(folder, {"checkable": source}, tokenizer, lambda amount: None)
    chosen: dict[str, Question] = {}
    for question in questions(seed, is_test=True):
        chosen.setdefault(question.text, question)
        if len(chosen) == num_test:
            break
    lines = [
        json.dumps({"id": number, "prompt": one.text, "answer": one.answer, "kind": one.kind}) + "\n"
        for number, one in enumerate(chosen.values())
    ]
    replace_file(folder / "tasks.jsonl", "".join(lines).encode())


def check(task: dict[str, Any], text: str) -> float:
    """A checker for tools/refine.py: 1.0 when the text is the task's answer, else 0.0."""
    return float(text.strip() == str(task["answer"]))
