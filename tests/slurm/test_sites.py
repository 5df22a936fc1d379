"""Two Slurm sites share one checkout: each has a file that git ignores, and GPT4MOE_SITE chooses one."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SBATCH = """#!/bin/sh
echo "partition ${SBATCH_PARTITION:-none} account ${SBATCH_ACCOUNT:-none}" >>submitted
echo 17
"""
ARGUMENTS = {
    "train": ["run.name=x"], "preflight": ["run.name=x"], "convert": ["verify", "a"],
    "generate": ["runs/x", "--output", "a"], "evaluate": ["runs/x", "--output=a"],
}  # fmt: skip


def submit(checkout: Path, script: str, site: str | None) -> subprocess.CompletedProcess[str]:
    """The script submits itself, to an sbatch that notes what it was given."""
    programs = checkout / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "sbatch").write_text(SBATCH)
    (programs / "sbatch").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "GPT4MOE_"))}
    variables = {**kept, "PATH": f"{programs}:{kept['PATH']}"} | ({"GPT4MOE_SITE": site} if site else {})
    command = ["bash", f"slurm/{script}.sh", "--nodes=1", *ARGUMENTS[script]]
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ARGUMENTS)
def test_each_site_has_its_own_defaults(script: str, checkout: Path) -> None:
    sites = checkout / "slurm" / "sites"
    sites.mkdir()
    (sites / "north.env").write_text("export SBATCH_PARTITION=gpu\n")
    (sites / "south.env").write_text("export SBATCH_PARTITION=accelerated SBATCH_ACCOUNT=project7\n")
    for site in ("north", "south", None):
        assert submit(checkout, script, site).returncode == 0
    assert (checkout / "submitted").read_text().splitlines() == [
        "partition gpu account none",
        "partition accelerated account project7",
        "partition none account none",
    ]


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_site_without_a_file_submits_nothing(script: str, checkout: Path) -> None:
    ended = submit(checkout, script, "west")
    cause, cure = ended.stderr.splitlines()
    assert (ended.returncode, (checkout / "submitted").exists()) == (2, False)
    assert "no slurm/sites/west.env" in cause and "unset GPT4MOE_SITE" in cure


def test_a_second_site_in_one_shell_is_refused(checkout: Path) -> None:
    """It would inherit what the first one exported."""
    sites = checkout / "slurm" / "sites"
    sites.mkdir()
    for site in ("north", "south"):
        (sites / f"{site}.env").write_text(f"export SBATCH_ACCOUNT={site}\n")
    lines = [
        f"GPT4MOE_SITE={site}; . slurm/cluster.env; echo $? $SBATCH_ACCOUNT" for site in ("north", "north", "south")
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "GPT4MOE_"))}
    ended = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=checkout, env=kept, capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == ["0 north", "0 north", "2 north"]
    assert "GPT4MOE_SITE=north" in ended.stderr and "another shell" in ended.stderr


def test_git_ignores_the_files_of_sites() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", "slurm/sites/north.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
