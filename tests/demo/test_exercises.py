"""Exercises: right, never learned and asked alike, the facts really those of this Python's library."""

import importlib
import json
from pathlib import Path

from gpt4moe.chat.rows import conversation_of
from gpt4moe.demo.exercises import Exercise, facts, held_out_items, learned, write_exercises


def is_right(exercise: Exercise) -> bool:
    words = exercise.question.rstrip("?.").replace(",", "").split()
    if exercise.kind == "facts":
        return any(hasattr(importlib.import_module(exercise.answer), word.strip(":?")) for word in words)
    if "=" in exercise.question:
        a, sign, b = words[:3]
        return int(exercise.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    if "larger" in exercise.question:
        return int(exercise.answer) == max(int(word) for word in words[3::2])
    letters = [word for word in words if len(word) == 1]
    by_verb = {"Reverse": letters[::-1], "Sort": sorted(letters), "Which": letters[-1:]}
    return exercise.answer.split() == by_verb[words[0]]


def test_answers_are_right_and_held_out_questions_are_never_learned() -> None:
    known, asked = list(learned(0, 3000)), held_out_items(0, 120)
    assert all(map(is_right, known)) and all(map(is_right, asked))
    assert {one.kind for one in known} == {one.kind for one in asked} == {"arithmetic", "strings", "facts"}
    assert not {one.question for one in known} & {one.question for one in asked}
    assert len({one.question for one in asked}) == len(asked)


def test_every_fact_that_is_asked_has_been_told_in_other_words() -> None:
    told = {one.answer for one in learned(0, 12_000) if one.kind == "facts"}
    assert {one.answer for one in held_out_items(0, 10) if one.kind == "facts"} <= told and len(facts()) > 40


def test_the_files_are_chat_lines_and_items_for_evaluate(tmp_path: Path) -> None:
    write_exercises(tmp_path, num_learned=100, num_test=10)
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    turns = [len(conversation_of(row, "f:1").messages) // 2 for row in rows]
    assert sum(turns) == 100 and {1, 2} == set(turns)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == list(range(len(items))) and items[0]["messages"][0]["role"] == "user"
