"""Files of prompts and answers: a line that is no prompt is named; one command writes at a time, into a file alone."""

import os
from pathlib import Path

import pytest

from gpt4moe.errors import DataError, LaunchError
from gpt4moe.inference.files import AnswerFile, read_prompts


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "\\ud800"}', '{"id": "\\ud800", "prompt": "a"}', '{"id": true, "prompt": "a"}', "[" * 100_000,
        '{"messages": []}', '{"messages": {"role": "user"}}', '{"prompt": 1}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "line\u2028separator\u0085"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 "):
        read_prompts(path)
    path.write_text(path.read_text(encoding="utf-8").split("\n")[0], encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["line\u2028separator\u0085"]


def test_a_second_command_does_not_write_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = AnswerFile(path, [1, 2])
    with pytest.raises(LaunchError, match="Another command writes"):
        AnswerFile(path, [1, 2])
    first.close()
    AnswerFile(path, [1, 2]).close()


def test_a_pipe_is_no_file_of_answers(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LaunchError, match="no file that can be resumed"):
        AnswerFile(tmp_path / "pipe", [1])
