"""What a folder was made of: noted before it is made, compared when it is there."""

import json
from pathlib import Path

import pytest

from gpt4moe.demo.made_of import mark_of, require_made_of
from gpt4moe.errors import LaunchError

ASKED = {"settings": {"lr": 0.1, "betas": (0.9, 0.95), "none": {}}, "base_sha256": "ab"}


def test_a_folder_that_is_there_must_have_been_made_of_what_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seen-0"
    require_made_of(folder, {"settings": "of a launch that never began"})
    require_made_of(folder, ASKED)
    assert json.loads(mark_of(folder).read_text())["base_sha256"] == "ab"
    folder.mkdir()
    require_made_of(folder, ASKED)
    other = {"settings": ASKED["settings"] | {"lr": 0.2}, "base_sha256": "cd", "more": None}
    with pytest.raises(LaunchError) as raised:
        require_made_of(folder, other)
    for said in ("base_sha256 ab, not cd", "settings.lr 0.1, not 0.2", "more nothing, not None"):
        assert said in raised.value.cause
    assert raised.value.cure.startswith(f"Delete {folder} ") and json.loads(mark_of(folder).read_text()) != other


def test_a_folder_of_which_nothing_says_what_it_was_made_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="beside it is not"):
        require_made_of(tmp_path, ASKED)
    assert not mark_of(tmp_path).exists()
