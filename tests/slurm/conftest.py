"""One real Slurm for all tests of this folder."""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.slurm_lab.cluster import SlurmLab


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    search = os.environ["PATH"] + ":/usr/sbin"
    if not all(shutil.which(name, path=search) for name in ("sbatch", "slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    lab = SlurmLab.start(tmp_path_factory.mktemp("slurm"))
    yield lab
    lab.stop()
