"""One real Slurm for all tests of this folder, and a checkout whose trainer is a stand-in that starts at once."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_lab.cluster import SlurmLab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    search = os.environ["PATH"] + ":/usr/sbin"
    if not all(shutil.which(name, path=search) for name in ("sbatch", "slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    lab = SlurmLab.start(tmp_path_factory.mktemp("slurm"))
    yield lab
    lab.stop()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that train.sh takes for the checkout; its gpt4moe.train is the stand-in."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "gpt4moe").mkdir()
    shutil.copy(Path(__file__).with_name("stand_in.py"), tmp_path / "gpt4moe" / "train.py")
    with (tmp_path / "slurm" / "cluster.env").open("a") as site:
        site.write(f"venv={sys.prefix}\nexport SBATCH_TIMELIMIT=7\n")
    return tmp_path
