"""A document with n words of an evaluation file is found, one with n - 1 is not."""

import json
from pathlib import Path

import pytest

from gpt4moe.corpus.decontamination import Decontamination
from gpt4moe.errors import DataError

QUESTION = "What, in the year 1969, was the first word that was spoken on the surface of the moon?"


def test_thirteen_words_in_a_row_are_found_whatever_the_case_and_the_signs(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"id": 1}) + "\n" + json.dumps({"question": {"stem": QUESTION}, "choices": ["a"]}))
    found = Decontamination([path], 13)
    words = QUESTION.replace(",", "").replace("?", "").upper().split()
    match = found.find("Some page says: " + "; ".join(words[2:15]) + " and more")
    assert match is not None and match.evaluation == f"{path}:2" and match.words == " ".join(words[2:15]).lower()
    assert found.find("Some page says: " + " ".join(words[2:14]) + " and more") is None
    assert found.find("") is None


def test_every_run_is_found_as_a_plain_search_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "tasks.txt"
    path.write_text("\n".join(f"the cat number {i} sat on mat {i * 3} all day" for i in range(50)))
    found, lines = Decontamination([path], 4), path.read_text().split("\n")
    runs = {tuple(line.split()[i : i + 4]) for line in lines for i in range(len(line.split()) - 3)}
    for i in range(300):
        words = ["and", *lines[i % 50].split()[i % 7 : i % 7 + 2 + i % 4], "then"]
        expected = any(tuple(words[j : j + 4]) in runs for j in range(len(words) - 3))
        assert (found.find(" ".join(words)) is not None) == expected


@pytest.mark.parametrize(("data", "said"), [(b"few words", "no run of 13"), (b"\xe4", "not UTF-8")])
def test_an_evaluation_file_that_finds_nothing_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(DataError, match=said):
        Decontamination([tmp_path / "t.txt"], 13)
