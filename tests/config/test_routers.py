"""Every router with every experiment: what docs/moe.md shows is legal, and so is what an error's cure makes."""

import re
import shlex
from pathlib import Path

import pytest

from gpt4moe.config.load import CONFIG_FOLDER, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.legality import require_legal

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "moe.md").read_text()
EXPERIMENTS, ROUTERS = (sorted(file.stem for file in (CONFIG_FOLDER / group).glob("*.yaml"))
                        for group in ("experiment", "router"))  # fmt: skip
EXAMPLES = re.findall(r"^(?:python|sbatch) .*router@.*$", PAGE, re.MULTILINE)


def require_runs(run: RunConfig) -> None:
    """On as many devices as it names."""
    require_legal(run.model, run.parallel, run.training, run.cluster.devices or 1)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_router_runs_with_an_experiment_at_once_or_after_the_one_cure_that_its_error_names(
    experiment: str, router: str
) -> None:
    overrides = [f"+experiment={experiment}", "run.name=x", f"router@model.moe.router={router}"]
    try:
        run = load_run_config(overrides)
    except ConfigError as error:
        cure = re.search(r"[a-z_.]+=\w+", error.cure)
        assert cure is not None
        run = load_run_config([*overrides, cure.group()])
    assert run.model.moe is not None
    require_runs(run)


@pytest.mark.parametrize("command", EXAMPLES)
def test_an_example_of_the_page_is_a_legal_run(command: str) -> None:
    overrides = [word for word in shlex.split(command) if "=" in word and not word.startswith("-")]
    require_runs(load_run_config(["run.name=x", *overrides]))


def test_the_page_shows_every_router_on_a_laptop_and_on_a_cluster() -> None:
    shown = {tuple(re.findall(r"(?:experiment|router)=(\w+)", command)) for command in EXAMPLES}
    assert shown >= {(experiment, router) for experiment in ("tiny", "gpt4") for router in ROUTERS if router != "top2"}
