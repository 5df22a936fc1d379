"""CI fails on a skip that is not in the table, and still ends on pytest's own closing line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def run(tmp_path: Path, reason: str, strict: bool) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_it.py").write_text(
        f"import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason={reason!r})\ndef test_b(): pass\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    return subprocess.run(
        command + ["--strict-skips"] * strict,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )


@pytest.mark.parametrize(
    ("reason", "strict", "status"),
    [("cannot find slurmd", True, 1), ("no GPU here", True, 0), ("cannot find slurmd", False, 0)],
)
def test_an_unexpected_skip_fails_a_strict_session(tmp_path: Path, reason: str, strict: bool, status: int) -> None:
    result = run(tmp_path, reason, strict)
    assert result.returncode == status
    assert ("test_it.py::test_b: Skipped" in result.stdout) == (status == 1)
    assert "1 passed, 1 skipped" in result.stdout.splitlines()[-1]
