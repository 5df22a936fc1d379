"""The scripts of examples/ run as a user would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> str:
    """What the script printed; it must end with 0."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/upcycle.py made: a dense run, its export, the mixture's run."""
    out = tmp_path_factory.mktemp("runs")
    (out / "printed").write_text(run("examples/upcycle.py", "--out", out))
    return out


def test_an_upcycled_model_goes_on_where_the_dense_one_was(runs: Path) -> None:
    dense = re.search(r"step 6/6 .*eval ([\d.]+)", (runs / "printed").read_text())
    first, *_, last = map(float, re.findall(r"\d+\.\d+", (runs / "printed").read_text().splitlines()[-1]))
    assert dense is not None
    # Another batch than the held-out one, so not equal; random weights would be at 8.3.
    assert abs(first - float(dense[1])) < 0.1
    assert last < first


def test_a_checkpoint_is_read_without_torch(runs: Path) -> None:
    lines = run("examples/read_checkpoint.py", runs / "mixture").splitlines()
    assert lines[0].endswith("step 6")
    assert [line.split(":")[0] for line in lines[1:]] == [f"decoder.layers.{n}.mlp.experts.down" for n in range(4)]


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "examples/read_checkpoint.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2


def test_a_router_of_one_s_own_trains(tmp_path: Path) -> None:
    rows = [line.split() for line in run("examples/own_router.py", "--out", tmp_path).splitlines()[-2:]]
    assert [row[0] for row in rows] == ["topk", "softplus"]
    assert all(7 < float(loss) < 8.3 for _, loss, _ in rows)
    assert rows[0][1] != rows[1][1]
