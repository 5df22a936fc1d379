"""A job of three nodes of which two train: one of the two is lost, the ranks go on at once on those that are left."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.slurm.test_train import ROOT, SMALL, records
from tests.slurm_lab.cluster import SlurmLab, until

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long, pytest.mark.timeout(1200)]


@pytest.fixture
def three_nodes(tmp_path_factory: pytest.TempPathFactory, slurm: SlurmLab) -> Iterator[SlurmLab]:
    """A cluster of its own. `slurm` skips where there is none."""
    lab = SlurmLab.start(tmp_path_factory.mktemp("spare"), nodes=3)
    yield lab
    lab.stop()


def documented() -> str:
    """The command of docs/operations.md, as it stands there."""
    page = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(r"\*\*A spare node\.\*\*.*?\n\n((?:    [^\n]*\n)+)", page, re.DOTALL)
    assert found is not None
    return "".join(line[4:] + "\n" for line in found[1].splitlines())


def test_the_documented_command_goes_on_without_a_node_that_was_lost(three_nodes: SlurmLab, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    words = [sys.executable, "-m", "gpt4moe.train", *SMALL, f"run.root={tmp_path}", "checkpoint.every=2",
             "parallel.ep=2", "training.steps=100000"]  # fmt: skip
    command = (
        documented()
        .replace("per-node=8", "per-node=1")
        .replace("ntasks=16", "ntasks=2")
        .replace("python -m gpt4moe.train ...", " ".join(words))
    )
    salloc, loop = command.split("\n", 1)
    (tmp_path / "loop.sh").write_text(loop + "exit $s\n")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MASTER_"))}
    variables = own | {"SLURM_CONF": str(three_nodes.folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen([*salloc.split(), "bash", str(tmp_path / "loop.sh")], stdout=said, stderr=said,
                               env=variables, cwd=ROOT)  # fmt: skip
    try:
        until(lambda: made(folder, 5), LONG)
        first = ranks_by_node(tmp_path)
        assert len(first) == 2
        lost = min(first)  # rank 0's: the ranks meet there
        first[lost].kill()
        three_nodes.call("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
        until(lambda: len(first_steps(folder)) == 2 and made(folder, first_steps(folder)[1] + 5), LONG)
        second = ranks_by_node(tmp_path)
        assert set(second) == {"node1", "node2", "node3"} - {lost}
        number = three_nodes.call("squeue", "-h", "-o", "%i").stdout.strip()
        three_nodes.call("scancel", "--signal=INT", number)
        assert job.wait() == 130, (tmp_path / "said").read_text()
    finally:
        job.kill()
    assert first_steps(folder)[1] > 1
    steps = [record["step"] for record in records(folder / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert (folder / "checkpoints" / f"step-{len(steps):08d}" / "manifest.json").is_file()


LONG = 500
"""Seconds that a launch may take on a machine that has little time for it."""


def made(folder: Path, steps: int) -> bool:
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and len(records(metrics)) >= steps


def ranks_by_node(root: Path) -> dict[str, psutil.Process]:
    """Node -> the rank that runs there."""
    found = {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        if command[1:3] == ["-m", "gpt4moe.train"] and f"run.root={root}" in command and "SLURM_PROCID" in variables:
            found[variables["SLURMD_NODENAME"]] = process
    return found


def first_steps(folder: Path) -> list[int]:
    return [yaml.safe_load(file.read_text())["first_step"] for file in sorted(folder.glob("starts/*.yaml"))]
