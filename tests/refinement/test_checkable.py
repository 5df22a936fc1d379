"""The checkable set: right answers, made from a seed, test tasks never trained on."""

import json
import random
from itertools import islice
from pathlib import Path

from gpt4moe.data.manifest import DataManifest
from gpt4moe.refinement.checkable import check, documents, questions, write_set, wrong_answer

RIGHT = {
    "add": lambda text: str(eval(text)), "sub": lambda text: str(eval(text)), "mul": lambda text: str(eval(text)),
    "rev": lambda text: text[::-1], "sort": lambda text: "".join(sorted(text)),
}  # fmt: skip


def test_answers_are_right_and_sides_disjoint() -> None:
    sides = [list(islice(questions(3, is_test=is_test), 2000)) for is_test in (False, True)]
    for question in sides[0] + sides[1]:
        kind, text = question.text.rstrip("=").split(" ")
        assert question.answer == RIGHT[kind](text)
    assert not {one.text for one in sides[0]} & {one.text for one in sides[1]}
    trained = "".join(documents(3, 2000, is_test=False))
    assert not [one.text for one in sides[1] if one.text in trained]


def test_a_seed_gives_the_same_documents() -> None:
    assert list(documents(1, 50, is_test=False)) == list(documents(1, 50, is_test=False))
    assert list(documents(1, 50, is_test=False)) != list(documents(2, 50, is_test=False))
    random_ = random.Random(0)
    assert all(wrong_answer("-12", random_) != "-12" for _ in range(50))


def test_the_set_is_a_data_folder_and_tasks(tmp_path: Path) -> None:
    write_set(tmp_path / "set", num_train=200, num_test=20)
    assert DataManifest.read(tmp_path / "set").vocab_size == 257
    tasks = [json.loads(line) for line in (tmp_path / "set" / "tasks.jsonl").read_text().splitlines()]
    assert len({task["prompt"] for task in tasks}) == 20
    assert check(tasks[0], f"{tasks[0]['answer']} ") == 1.0 and check(tasks[0], "x") == 0.0
