"""The dashboard's file: what is wrong in it is named; wandb-workspaces takes it and sends it, all of it."""

import copy
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt4moe.errors import ConfigError
from gpt4moe.runlog.dashboard import DASHBOARD_FILE, Dashboard, read_dashboard
from gpt4moe.runlog.metrics import Parts
from gpt4moe.runlog.metrics_table import METRICS
from tests.runlog.wandb_server import wandb_server
from tests.training.command import outside

ROOT = DASHBOARD_FILE.parents[1]
SPIKE = {"name": "n", "metric": "loss", "rule": "spike", "steps": 50, "times": 6}


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/dashboard.py", *arguments], cwd=ROOT, env=outside() | variables, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip


def shown(dashboard: Dashboard) -> set[str]:
    return {name for section in dashboard.sections for panel in section.panels for name in panel.metrics}


def test_the_shipped_panels_show_all_but_the_clock() -> None:
    names = shown(read_dashboard())
    assert set(METRICS) - {name.partition("/")[0] for name in names} == {
        "step", "consumed_tokens", "step_seconds", "eta_seconds", "busiest_rank",
    }  # fmt: skip
    assert {f"{name}/*" for name, metric in METRICS.items() if metric.parts is not Parts.none} - names == {
        "dead_experts/*"
    }


@pytest.mark.parametrize(
    ("panel", "said"),
    [
        ({"metrics": ["loss"]}, "title"),
        ({"title": "t", "metrics": ["los"]}, "'los', no metric"),
        ({"title": "t", "metrics": ["grad_norm/*"]}, "no metric"),
        ({"title": "t", "metrics": ["loss/code"]}, "no metric"),
        ({"title": "t", "metrics": []}, "none"),
        ({"title": "t", "metrics": ["loss", "mfu"]}, "several units"),
        ({"title": "t", "metrics": ["loss"], "scale": "cubic"}, "cubic"),
        ({"title": "t", "metrics": ["loss"], "wide": 1}, "wide"),
        ({"title": "t", "metrics": ["loss"], "colour": "red"}, "colour"),
        ("loss", "is 'loss'"),
    ],
)
def test_a_wrong_panel_is_refused_by_its_place(panel: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text(yaml.safe_dump({"sections": [{"title": "s", "panels": [panel]}], "alerts": []}))
    with pytest.raises(ConfigError, match=said) as error:
        read_dashboard(file)
    assert "sections[0] ('s').panels[0]" in error.value.cause


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rule": "guess"}, "guess"),
        ({"times": 0}, "times"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"limit": 1}, "limit"),
        ({"metric": "loss/*"}, "one metric"),
        ({"metric": "step"}, "no metric"),
    ],
)
def test_a_wrong_alert_is_refused_by_its_place(change: dict[str, object], said: str, tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text(yaml.safe_dump({"sections": [], "alerts": [SPIKE]}))
    assert len(read_dashboard(file).alerts) == 1
    file.write_text(yaml.safe_dump({"sections": [], "alerts": [SPIKE | change]}))
    with pytest.raises(ConfigError, match=said) as error:
        read_dashboard(file)
    assert "alerts[0]" in str(error.value)


PANEL = {"title": "p", "metrics": ["loss"], "scale": "log", "wide": True, "smooth": False}
ALERT_OF_EACH_RULE = [
    SPIKE,
    {"name": "n", "metric": "loss", "rule": "stays_above", "limit": 1, "steps": 5},
    {"name": "n", "metric": "loss", "rule": "drop", "steps": 5, "recent": 2, "share": 0.5},
    {"name": "n", "metric": "loss", "rule": "plateau", "steps": 5},
    {"name": "n", "metric": "step_seconds", "rule": "stalled", "times": 2, "seconds": 3},
]
WRONG: list[Any] = [
    None, True, 0, -1, 2.5, 5, math.nan, math.inf, -math.inf, 10**400, 10**14, "", " ", "junk", [], ["junk"], [[1]], {},
    {"a": 1}, {1: [2]}, b"x", datetime.date(2026, 1, 2), "x" * 500,
]  # fmt: skip
RIGHT = {
    "title": ["junk", "x" * 500], "name": ["junk", "x" * 500], "wide": [True], "smooth": [True],
    "steps": [5], "recent": [5], "times": [2.5, 5, 10**14], "seconds": [2.5, 5, 10**14], "limit": [0, 2.5, 5, 10**14],
    "sections": [[]], "panels": [[]], "alerts": [[]],
}  # fmt: skip
"""Of WRONG, what is right in a place."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value of a file, as the keys that lead to it."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_a_wrong_value_in_any_place_is_refused_in_short_words_that_name_it(tmp_path: Path) -> None:
    wholes: list[Any] = [{"sections": [{"title": "s", "panels": [PANEL]}], "alerts": []}]
    wholes += [{"sections": [], "alerts": [alert]} for alert in ALERT_OF_EACH_RULE]
    file, count = tmp_path / "d.yaml", 0
    for whole, path in [(each, path) for each in wholes for path in places(each)]:
        for wrong in WRONG:
            changed = copy.deepcopy(whole)
            place: Any = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            file.write_text(yaml.safe_dump(changed))
            if any(type(wrong) is type(right) and wrong == right for right in RIGHT.get(path[-1], [])):
                read_dashboard(file)
                continue
            with pytest.raises(ConfigError) as error:
                read_dashboard(file)
            cause, cure = error.value.cause, error.value.cure
            assert len(cause) < 400 and "\n" not in cause + cure
            top, index = path[0], path[1] if len(path) > 1 else None
            assert (top if index is None else f"{top}[{index}]") in cause, (path, wrong, cause)
            count += 1
    assert count > 600


@pytest.mark.parametrize(
    "content", [None, "a: [", "sections: []", "[]", "a: 2026-13-45", "[" * 400, "a: " + "1" * 5000, "a: &a [*a]", "\0"]
)
def test_a_file_that_is_no_dashboard_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"d\.yaml"):
        read_dashboard(file)


def test_push_sends_every_panel_prints_the_address_and_writes_that_one_anew(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({"sections": [{"title": "s", "panels": [PANEL]}], "alerts": []}))
    with wandb_server() as server:
        pushed = command("push", "--entity", "team", **server.variables)
        again = command(
            "push", "--entity", "team", "--file", str(tmp_path / "d.yaml"), "--url", pushed.stdout.strip(),
            **server.variables,
        )  # fmt: skip
    address = server.variables["WANDB_BASE_URL"]
    assert (pushed.returncode, pushed.stdout) == (0, f"{address}/team/gpt4moe?nw=abc\n"), pushed.stderr
    view, anew = server.views
    assert (again.returncode, again.stdout, anew["id"]) == (0, pushed.stdout, "1"), again.stderr
    assert [it["name"] for it in json.loads(anew["spec"])["section"]["panelBankConfig"]["sections"]] == ["s"]
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "gpt4moe", "gpt4moe")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    dashboard = read_dashboard()
    assert [section["name"] for section in sections] == [section.title for section in dashboard.sections]
    for sent, section in zip(sections, dashboard.sections, strict=True):
        configs = [panel["config"] for panel in sent["panels"]]
        assert [config["chartTitle"] for config in configs] == [panel.title for panel in section.panels]
        for config, panel in zip(configs, section.panels, strict=True):
            assert config["metrics"] == [name for name in panel.metrics if not name.endswith("/*")]
            assert config.get("metricRegex", "") == "".join(f"^({n[:-1]})" for n in panel.metrics if n.endswith("/*"))


def test_check_needs_no_network_and_refuses_with_status_2(tmp_path: Path) -> None:
    checked = command("check", WANDB_BASE_URL="http://127.0.0.1:9")
    assert checked.returncode == 0 and "all good" in checked.stdout, checked.stderr
    (tmp_path / "d.yaml").write_text("sections: 1\nalerts: []\n")
    refused = command("check", "--file", str(tmp_path / "d.yaml"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "sections is no list" in refused.stderr and "Traceback" not in refused.stderr
