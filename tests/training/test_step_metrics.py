"""Losses of data sources, router health by layers, the time split, and what a run uses."""

import math
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.load import load_run_config
from gpt4moe.data.loader import build_data
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import train_tokenizer
from tests.training.command import BATCH, SEQ, SMALL, metrics, train

VOCABULARY = 300
LAYERS = ("model.num_layers=4", "model.moe.layer_pattern=[0,1,1,1]", "model.ffn_hidden_size=64")


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for data of two sources that do not read alike."""
    folder = tmp_path_factory.mktemp("corpus")
    numbers = [f"word {i} and {i * i} other things\n" for i in range(200)]
    stars = ["* * * * * * * * * *\n"] * 200
    train_tokenizer(numbers + stars, vocab_size=VOCABULARY).backend.save(str(folder / "tokenizer.json"))
    texts = {"numbers": numbers, "stars": stars}
    sources = {
        name: SourceText(train=lines, valid=lines[:100], licence="CC0-1.0", description=name)
        for name, lines in texts.items()
    }
    write_data_folder(folder, sources, folder / "tokenizer.json", lambda amount: None)
    return ("data=demo", f"data.path={folder}", f"model.vocab_size={VOCABULARY}")


@pytest.fixture(scope="module")
def sourced(tmp_path_factory: pytest.TempPathFactory, two_sources: tuple[str, ...]) -> list[dict[str, Any]]:
    """Five steps on one rank; layer 0 is dense."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    (ended,) = train(folder, *two_sources, *LAYERS, "training.steps=5")
    assert ended.status == 0, ended.err
    return metrics(folder, timings=True)


def test_losses_of_sources_weighted_by_their_tokens_are_the_loss(
    sourced: list[dict[str, Any]], two_sources: tuple[str, ...]
) -> None:
    data = build_data(load_run_config([*SMALL, "run.name=x", *two_sources]))
    for record in sourced:
        before, after = (data.consumed_per_source((record["step"] - more) * BATCH) for more in (1, 0))
        samples = {name: after[name] - before[name] for name in after}
        assert sum(samples.values()) == BATCH
        mean = sum(record.get(f"loss/{name}", 0) * count for name, count in samples.items()) / BATCH
        assert mean == pytest.approx(record["loss"], rel=1e-6)  # losses are summed in fp32
        assert {name for name, count in samples.items() if count} == {
            key.removeprefix("loss/") for key in record if key.startswith("loss/")
        }
    assert sourced[-1]["eval_loss/stars"] < sourced[-1]["eval_loss"] < sourced[-1]["eval_loss/numbers"]


@pytest.mark.parametrize(
    "layout", [("parallel.pp=2",), ("parallel.cp=2",), ("parallel.tp=2", "parallel.ep=2"), ("parallel.ep=2",)]
)
def test_every_layout_tells_the_same_losses_and_router_health(
    layout: tuple[str, ...], sourced: list[dict[str, Any]], two_sources: tuple[str, ...], tmp_path: Path
) -> None:
    # With pp=2 the stages own other layers, and the first has no loss: all must tell the same.
    assert train(tmp_path / "x", *two_sources, *LAYERS, "training.steps=2", *layout, ranks=2)[0].status == 0
    for ours, theirs in zip(metrics(tmp_path / "x"), sourced, strict=False):
        for key in ours:
            if key.startswith(("loss", "router_", "expert_load", "dead", "dropped")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key  # fp32 sums in another order


def test_router_health_is_told_by_layer_and_over_all(sourced: list[dict[str, Any]]) -> None:
    for record in sourced:
        by_layer = {
            name: [record[f"{name}/layer_{layer}"] for layer in (1, 2, 3)]
            for name in ("expert_load_max_over_mean", "expert_load_variation", "dead_experts", "router_entropy")
        }
        assert not [key for key in record if key.endswith("layer_0")]
        assert record["expert_load_max_over_mean"] == max(by_layer["expert_load_max_over_mean"])
        assert record["expert_load_variation"] == max(by_layer["expert_load_variation"])
        assert record["dead_experts"] == sum(by_layer["dead_experts"])
        assert record["router_entropy"] == pytest.approx(sum(by_layer["router_entropy"]) / 3)


def test_one_source_has_no_loss_of_its_own(whole_run: Path) -> None:
    assert not [key for record in metrics(whole_run) for key in record if key.startswith(("loss/", "eval_loss/"))]


def test_the_parts_of_a_step_add_up_to_it(whole_run: Path) -> None:
    for record in metrics(whole_run, timings=True):
        parts = [record[f"{name}_seconds"] for name in ("data", "forward_backward", "optimizer")]
        assert min(parts) > 0
        assert math.fsum(parts) == pytest.approx(record["step_seconds"])
        assert ("other_seconds" in record) == ("eta_seconds" in record) == (record["step"] > 1)


def test_mfu_is_the_models_flops_over_the_devices_peak(whole_run: Path) -> None:
    run = load_run_config([*SMALL, "run.name=x"])
    for record in metrics(whole_run, timings=True):
        flops = flops_per_token(run.model).model * BATCH * SEQ / record["step_seconds"]
        assert record["mfu"] == pytest.approx(flops / run.cluster.peak_flops_fp32)


def test_another_devices_peak_and_price_are_not_taken(tmp_path: Path) -> None:
    assert train(tmp_path / "x", "training.steps=1", "cluster=h100_80g")[0].status == 0
    (record,) = metrics(tmp_path / "x", timings=True)
    assert not {"mfu", "cost_usd"} & set(record)
    assert record["device_hours"] > 0 and record["peak_memory_bytes"] > 50e6


def test_hours_and_money_go_on_over_a_restart_and_count_its_devices(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=2", "cluster.usd_per_hour=3")[0].status == 0
    first = metrics(folder, timings=True)[-1]
    assert first["cost_usd"] == pytest.approx(3 * first["device_hours"])
    assert train(folder, "training.steps=4", "parallel.ep=2", "cluster.usd_per_hour=5", ranks=2)[0].status == 0
    third, last = metrics(folder, timings=True)[2:]
    assert third["device_hours"] > first["device_hours"]
    for record in (third, last):
        more = record["device_hours"] - first["device_hours"]
        assert record["cost_usd"] == pytest.approx(first["cost_usd"] + 5 * more)
    # Two devices for every second that goes by.
    wall = last["step_seconds"] + last["other_seconds"]
    assert last["device_hours"] - third["device_hours"] == pytest.approx(2 * wall / 3600, rel=0.2)
