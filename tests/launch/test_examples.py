"""The jobs that docs and scripts show are legal as they stand, on the ranks that the line itself asks for."""

import re
from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.legality import require_legal

ROOT = Path(__file__).resolve().parents[2]
SHOWN_IN = ("docs/operations.md", "slurm/train.sh", "slurm/preflight.sh", "slurm/cluster.env", "tools/preflight.py")
OWN_KEYS = ("time_limit=", "ranks=", "signal=")


def examples() -> list[str]:
    """Lines that submit a run on a number of nodes, without prompts and comments."""
    lines = [line for file in SHOWN_IN for line in (ROOT / file).read_text().splitlines()]
    shown = [line.lstrip("# ").split(" #")[0] for line in lines if "--nodes=" in line and "+experiment=" in line]
    return [line for line in dict.fromkeys(shown) if "..." not in line]


def test_there_are_examples() -> None:
    assert {re.search(r"experiment=(\w+)", line)[1] for line in examples()} == {"tiny", "gpt4"}  # type: ignore[index]


@pytest.mark.parametrize("line", examples())
def test_an_example_is_legal_as_it_stands(line: str) -> None:
    options = dict(word.split("=") for word in line.split() if word.startswith("--"))
    overrides = [word for word in line.split() if re.match(r"\+?[a-z_.]+=", word) and not word.startswith(OWN_KEYS)]
    run = load_run_config(overrides if any("run.name" in word for word in overrides) else [*overrides, "run.name=x"])
    ranks = int(options["--nodes"]) * int(options["--ntasks-per-node"])
    require_legal(run.model, run.parallel, run.training, ranks)
