"""docs/extending.md is carried out: each recipe is made in a copy of the checkout, and its commands run there.

A recipe is a `## ` section. Its fenced blocks say what they are for:

    ```python gpt4moe/moe/routers/coin.py     a new file
    ```diff gpt4moe/config/moe.py             lines to add (+) and remove (-), found by the lines around them
    ```sh                                     commands that must succeed, one a line
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def checkout(folder: Path) -> Path:
    """What git tracks, and what it would: a copy as the edits find it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def edited(text: str, diff: str) -> str:
    """`text` with a diff's hunks made; `...` parts two hunks. A hunk must fit in exactly one place."""
    for hunk in re.split(r"^\.\.\.\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " -" or not line)
        after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in " +" or not line)
        assert text.count(before) == 1, f"{text.count(before)} places fit:\n{hunk}"
        text = text.replace(before, after)
    return text


def carry_out(recipe: str, folder: Path) -> None:
    """Makes a recipe's edits in a copy and runs its commands there."""
    for kind, name, body in BLOCK.findall(recipe):
        if kind == "sh" and not name:
            for line in body.splitlines():
                command = shlex.split(line, comments=True)
                assert command[0] in ("python", "bash"), line
                program = [sys.executable] if command[0] == "python" else ["bash"]
                done = subprocess.run(program + command[1:], cwd=folder, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        elif kind == "diff":
            (folder / name).write_text(edited((folder / name).read_text(), body))
        else:
            assert not (folder / name).exists(), f"{name} is there already"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(body)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_does_what_it_says(title: str, tmp_path: Path) -> None:
    carry_out(RECIPES[title], checkout(tmp_path))
    carry_out(
        "```sh\npython -m pytest -q -p no:cacheprovider tests/test_house.py -k 'not torch and not planted'\n```\n",
        tmp_path,
    )


def test_a_recipe_that_no_longer_fits_is_found(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("a = 1\nb = 2\n")
    carry_out("```diff file.py\n a = 1\n+c = 3\n```\n", tmp_path)
    assert (tmp_path / "file.py").read_text() == "a = 1\nc = 3\nb = 2\n"
    with pytest.raises(AssertionError, match="0 places fit"):
        carry_out("```diff file.py\n gone\n+c = 3\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="no such"):
        carry_out("```sh\npython -c \"raise SystemExit('no such')\"\n```\n", tmp_path)
