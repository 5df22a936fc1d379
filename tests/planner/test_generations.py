"""Clusters and hardware generations: facts decide, not names; what is missing is said with its cause and cure."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4moe.config.cluster import Generation
from gpt4moe.planner.efficiency import GENERATIONS, PROFILES, planning_profile
from gpt4moe.planner.estimate import estimate
from gpt4moe.planner.plan_json import to_json
from tests.planner.timed import plan_of

ROOT = Path(__file__).resolve().parents[2]
ROW = '    Generation.rubin: GenerationTiming(profile=_CORE, constants="Hopper\'s"),\n'


@pytest.mark.parametrize("generation", Generation)
def test_every_generation_has_its_row_and_a_profile(generation: Generation) -> None:
    assert GENERATIONS[generation].profile in PROFILES
    assert planning_profile(generation).score_passes == 0


@pytest.mark.parametrize("cluster", ["cpu", "h100_80g"])
def test_the_name_of_a_cluster_moves_no_plan(cluster: str) -> None:
    """A laptop of one's own with the facts of cluster=cpu keeps the same activations."""
    known, renamed = plan_of("model=tiny", f"cluster={cluster}"), plan_of("model=tiny", f"cluster={cluster}")
    renamed.cluster.name = "laptop"
    one, other = to_json(estimate(known)), to_json(estimate(renamed))
    assert {**one, "warnings": []} == {**other, "warnings": []}


def test_a_new_generation_needs_the_enum_and_one_row(tmp_path: Path) -> None:
    """Without the row: cause and cure, exit status 2. With it: a plan that says what its seconds rest on."""
    for folder in ("gpt4moe", "configs", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    _edit(tmp_path / "gpt4moe/config/cluster.py", '    hopper = "hopper"\n', '    rubin = "rubin"\n')
    facts = (ROOT / "configs/cluster/h100_80g.yaml").read_text().replace("hopper", "rubin")
    (tmp_path / "configs/cluster/r200.yaml").write_text(facts)
    refused = _planned(tmp_path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "cluster.generation=rubin has no row in GENERATIONS" in refused.stderr.replace("\n", " ")
    assert "set cluster.generation to one of ampere, hopper" in refused.stderr.replace("\n", " ")
    _edit(tmp_path / "gpt4moe/planner/efficiency.py", "GENERATIONS = {\n", ROW)
    planned = _planned(tmp_path)
    assert planned.returncode == 0
    assert "time on rubin takes constants Hopper's; no published row on it was found" in planned.stdout


def _planned(tree: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tools/plan.py", "model=tiny", "cluster=r200", "output=json"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def _edit(file: Path, after: str, line: str) -> None:
    text = file.read_text()
    assert text.count(after) == 1
    file.write_text(text.replace(after, after + line))
