"""tools/plan.py: the JSON contract, what it refuses, and that it stays light."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from io import StringIO
from pathlib import Path
from time import process_time

import pytest
from rich.console import Console

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.serve_command import plan_overrides, serving_overrides
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.pages.plan_answer import json_answer, table_answer
from gpt4moe.planner.estimate import estimate
from gpt4moe.planner.search import search
from tests.planner.timed import plan_of

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = {
    "parameters": {"total", "active", "per_component", "per_rank"},
    "flops": {"per_token", "total", "total_with_attention"},
    "layout": {"tp", "pp", "vpp", "ep", "etp", "cp", "dp", "world"},
    "memory": {"per_stage"},
    "time": {"step_seconds", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "days", "parts"},
    "cost": {"usd", "gpu_hours", "kwh"},
}
STAGE = {"weights", "gradients", "optimizer", "activations", "buffers", "total"}


def plan_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@cache
def gpt4() -> dict:
    return json.loads(plan_command("+experiment=gpt4", "output=json").stdout)


def test_the_json_has_the_keys_of_the_contract_and_no_others() -> None:
    needs = {"checkpoints", "data", "network", "carbon", "stack", "unbuilt"}
    assert set(gpt4()) == {*CONTRACT, *needs, "phases", "interval", "bottleneck", "warnings"}
    for section, keys in CONTRACT.items():
        assert set(gpt4()[section]) == keys, section
    assert {key for stage in gpt4()["memory"]["per_stage"] for key in stage} == {f"{name}_bytes" for name in STAGE}


def test_the_numbers_of_the_json_agree_with_each_other() -> None:
    plan = gpt4()
    assert plan["layout"]["world"] == 24960 == 8 * 15 * 208
    assert len(plan["memory"]["per_stage"]) == 15
    for stage in plan["memory"]["per_stage"]:
        lines = [value for name, value in stage.items() if name != "total_bytes"]
        assert sum(lines) == stage["total_bytes"]
    time, cost = plan["time"], plan["cost"]
    stalls = time["parts"]["checkpoint"] + time["parts"]["failures"]
    assert sum(time["parts"].values()) - stalls == pytest.approx(time["step_seconds"])
    assert time["days"] * 86400 == pytest.approx(217_000 * sum(time["parts"].values()))
    assert cost["gpu_hours"] == pytest.approx(24960 * 24 * time["days"])
    assert cost["usd"] == pytest.approx(1.10 * cost["gpu_hours"])
    assert time["tokens_per_second_per_gpu"] * 24960 == pytest.approx(time["tokens_per_second"])
    used = plan["flops"]["total_with_attention"] / (217_000 * time["step_seconds"] * 24960 * 312e12)
    assert time["mfu"] == pytest.approx(used)
    parameters = plan["parameters"]
    assert sum(parameters["per_component"].values()) == parameters["total"]
    assert len(parameters["per_rank"]) == 15
    assert (
        16 * sum(rank["experts"] for rank in parameters["per_rank"]) == parameters["per_component"]["experts"]
    )  # ep 16


@pytest.mark.parametrize(
    ("arguments", "cause", "cure"),
    [
        (["+experiment=gpt4", "parallel.tp=7"], "parallel.tp=7", "parallel.tp=8"),
        (["+experiment=gpt4", "gpus=25000"], "does not divide", "gpus=24960"),
        (["model=mixtral_8x7b", "cluster=h1000"], "cluster/h1000", "h100_80g"),
        (["model=mixtral_8x7b", "cluster=a100"], "a100_40g or a100_80g", "cluster=a100_40g or cluster=a100_80g"),
        (["+experiment=gpt4", "ouput=json"], "ouput", "output"),
        (["+experiment=gpt4", "ranks=24960"], "ranks", "gpus="),
        (["report=leak", "output=html"], "report=... with output=html", "output=json"),
    ],
)
def test_bad_input_is_one_line_of_cause_and_one_of_cure(arguments: list[str], cause: str, cure: str) -> None:
    result = plan_command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    said, cured = result.stderr.strip().splitlines()
    assert cause in said and cure in cured


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (["report=leak", "gpus=8"], "gpus"),
        (["report=leak", "+experiment=gpt4"], "experiment"),
        (["report=leak", "search=true"], "search"),
        (["calibrate=runs/first", "cluster=h100_80g"], "cluster"),
        (["calibrate=runs/first", "report=leak"], "calibrate"),
        (["budget_usd=1e6"], "budget_usd"),
        (["days=3"], "days"),
        (["top=3"], "top"),
        (["search=true", "parallel.tp=2"], "parallel.tp"),
        (["search=true", "parallel=tp2_pp2_ep2"], "parallel"),
        (["search=true", "training.micro_batch_size=2"], "training.micro_batch_size"),
        (["file=page.html"], "file"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(arguments: list[str], idle: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{idle} has no effect") as caught:
        load_plan_config(arguments)
    assert caught.value.cure.startswith(f"Leave out {idle}, or ")


def test_each_cure_of_an_illegal_layout_works_as_it_stands() -> None:
    wrong = (("gpus=999",), ("parallel.pp=16",), ("parallel.tp=7",), ("parallel.vpp=3",), ("parallel.ep=5",),
             ("training.global_batch_size=7281",))  # fmt: skip
    for overrides in wrong:
        with pytest.raises(LayoutError) as caught:
            estimate(plan_of("+experiment=gpt4", *overrides))
        changes = caught.value.cure.removeprefix("Set ").removeprefix("one of ").rstrip(".").split(", ")
        assert changes and all("=" in change for change in changes)
        for change in changes:
            assert estimate(plan_of("+experiment=gpt4", *overrides, change)).step.seconds > 0


@pytest.mark.parametrize(
    ("word", "cure"),
    [("search", "search=true"), ("finetune", "+experiment=gpt4_sft epochs=3"), ("gpt4-numbers", "report=leak"),
     ("--json", "output=json"), ("--HTML", "output=html file=plan.html"), ("calibrate", "calibrate=runs/NAME")],
)  # fmt: skip
def test_a_word_that_people_try_first_is_refused_with_what_to_write(word: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=f"^'{word}' is no word of plan.py") as caught:
        plan_overrides(["+experiment=gpt4", word])
    assert cure in caught.value.cure
    for served, said in (("search", "Write nothing"), ("json", "Write output=json"), ("sft", "Leave one of them out")):
        with pytest.raises(ConfigError) as caught:
            plan_overrides(["serve", served])
        assert said in caught.value.cure, "search=true would be refused beside serve"
    assert plan_overrides(["serve", "tp=2"]) == ["inference.tp=2", "report=inference"]


def test_help_teaches_by_examples_and_needs_no_configuration() -> None:
    result = plan_command("--help")
    assert result.returncode == 0
    assert result.stdout.count("python tools/plan.py") >= 5


def test_commands_of_the_planners_pages_compose() -> None:
    commands = set()
    for page in ("planner.md", "planner-stacks.md", "plan-decisions.md"):
        commands |= set(re.findall(r"python tools/plan\.py ([^`#\n]+)", (ROOT / "docs" / page).read_text()))
    commands = {one for one in commands if "--help" not in one and "+experiment=gpt4 " not in f"{one} "}
    assert len(commands) > 6
    for command in commands:
        words = shlex.split(command)
        load_plan_config(serving_overrides(words) if "serve" in words else words)


def test_every_column_and_row_says_its_unit() -> None:
    console = Console(width=220, record=True, file=StringIO())
    for part in table_answer(plan_of("+experiment=gpt4")):
        console.print(part, markup=False)  # as tools/plan.py does
    text = console.export_text()
    for unit in ("[GB]", "time [s]", "share [%]", "USD", "kWh", "days", "tokens/s", "FLOP", "10^9 parameters"):
        assert unit in text, unit


def test_the_search_finds_a_layout_that_fits_and_is_no_slower_than_the_next() -> None:
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "gpus=32", "training.global_batch_size=64", "search=true")
    layouts = json_answer(plan)["layouts"]
    assert isinstance(layouts, list) and len(layouts) == plan.top
    steps = [found["time"]["step_seconds"] for found in layouts]
    assert steps == sorted(steps)
    for found in layouts:
        assert max(stage["total_bytes"] for stage in found["memory"]["per_stage"]) <= plan.cluster.memory_bytes


def test_experts_are_cut_where_they_are_spread_as_far_as_they_go_and_the_search_takes_seconds() -> None:
    """GPT-4 on its 24,960 devices; seconds of this process' own work, so that a busy machine changes little."""
    plan = plan_of("+experiment=gpt4", "search=true", "top=20")  # the ten fastest that fit need no cut
    started = process_time()
    estimate(plan)
    arithmetic = process_time() - started
    found = search(plan).found
    assert arithmetic < 0.1 and process_time() - started < 3
    assert {(best.layout.ep, best.layout.etp) for best in found} >= {(16, 1), (16, 2)}


def test_tokens_set_the_steps_of_a_plan_and_of_a_search() -> None:
    asked = ["model=mixtral_8x7b", "cluster=h100_80g", "training.global_batch_size=64"]
    plan = load_plan_config([*asked, "gpus=8", "parallel.ep=8", "tokens=1e12"])
    each = 64 * plan.model.seq_length
    assert (plan.training.steps - 1) * each < 1e12 <= plan.training.steps * each
    assert 1e12 <= estimate(plan).tokens < 1e12 + each
    assert load_plan_config([*asked, "search=true", "tokens=1e12"]).training.steps == plan.training.steps
    with pytest.raises(ConfigError, match=r"tokens=1e\+12 and training.steps=3 both"):
        load_plan_config([*asked, "tokens=1e12", "training.steps=3"])
    with pytest.raises(ConfigError, match=r"epochs=3 and tokens=1e\+12 both"):
        load_plan_config([*asked, "tokens=1e12", "epochs=3"])
    with pytest.raises(ConfigError, match="tokens=0"):
        load_plan_config([*asked, "tokens=0"])


def test_a_default_of_1000_steps_is_remarked_on() -> None:
    asked = ("model=mixtral_8x7b", "cluster=h100_80g", "gpus=8", "parallel.ep=8")
    remarks = [line for line in estimate(plan_of(*asked)).warnings if "a plan's default" in line]
    assert len(remarks) == 1 and "set tokens=... or training.steps=..." in remarks[0]
    chosen = load_plan_config([*asked, "training.steps=1000"])
    assert not [line for line in estimate(chosen).warnings if "a plan's default" in line], "1000 said is no default"
    for said in ("training.steps=999", "tokens=1e9"):
        assert not [line for line in estimate(plan_of(*asked, said)).warnings if "a plan's default" in line]


def test_a_budget_buys_devices_and_tokens() -> None:
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "search=true", "training.global_batch_size=64")
    plan.budget_usd, plan.days = 64 * 24 * 10 * 2.50, 10.0
    result = json_answer(plan)
    assert result["gpus"] == 64
    best = result["layouts"][0]  # type: ignore[index]
    seconds = 10 * 86400
    assert result["tokens"] == pytest.approx(best["time"]["tokens_per_second"] * seconds, rel=0.05)
    least, most = result["tokens_interval"]  # type: ignore[misc]
    slow, fast = best["interval"]["step_seconds"][::-1]
    step = best["time"]["step_seconds"]
    assert (least, most) == pytest.approx((result["tokens"] * step / slow, result["tokens"] * step / fast))  # type: ignore[operator]


def test_what_63_million_dollars_train_in_95_days_is_gpt4_on_its_devices() -> None:
    """The money rents 25,112, which no layout divides well; the search comes to the devices of the report."""
    plan = plan_of("+experiment=gpt4", "search=true")
    plan.budget_usd, plan.days = 63e6, 95.0
    result = search(plan)
    assert result.gpus == 24960
    assert result.tokens is not None and 10e12 < result.tokens < 13e12, "a fifth less than was reported"
