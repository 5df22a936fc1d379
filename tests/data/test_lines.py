"""jsonl with checked fields."""

from pathlib import Path

import pytest

from gpt4moe.data.lines import read_lines, require_own_ids
from gpt4moe.errors import DataError

TYPES = {"prompt": str, "answer": (str, list)}


def _read(path: Path, content: str) -> list[dict[str, object]]:
    path.write_text(content, encoding="utf-8")
    return read_lines(path, TYPES, needed=("prompt",), example='{"prompt": "a"}')


def test_a_line_keeps_its_fields_its_id_and_its_number(tmp_path: Path) -> None:
    # A line separator inside a text is no end of a line.
    found = _read(
        tmp_path / "a.jsonl", '{"prompt": "a\u2028b", "more": 1}\n\n{"id": "x", "prompt": "", "answer": ["b"]}'
    )
    assert found == [
        {"id": 1, "line": 1, "prompt": "a\u2028b", "whole": {"prompt": "a\u2028b", "more": 1}},
        {"id": "x", "line": 3, "prompt": "", "answer": ["b"], "whole": {"id": "x", "prompt": "", "answer": ["b"]}},
    ]


def test_two_lines_with_one_id_are_refused(tmp_path: Path) -> None:
    lines = _read(tmp_path / "a.jsonl", '{"prompt": "a", "id": 2}\n{"prompt": "b"}')
    with pytest.raises(DataError, match="the id 2 twice"):
        require_own_ids(tmp_path / "a.jsonl", lines)
    require_own_ids(tmp_path / "a.jsonl", lines[:1])


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "is empty"), ("{", "line 1 is no JSON"), ("\n3", "line 2 is no JSON object"), ('{"id": 1}', "no 'prompt'"),
        ('{"prompt": true}', "prompt=True"), ('{"prompt": "a", "answer": [1]}', "answer=[1]"),
        ('{"prompt": "a", "id": true}', "id=True"),
        ('{"prompt": "\\ud800"}', "line 1 has half of a surrogate pair"), ("[" * 100_000, "line 1 is no JSON"),
    ],
)  # fmt: skip
def test_the_first_line_that_is_none_is_named(tmp_path: Path, content: str, cause: str) -> None:
    with pytest.raises(DataError) as error:
        _read(tmp_path / "a.jsonl", content)
    assert cause in error.value.cause and '{"prompt": "a"}' in error.value.cure
