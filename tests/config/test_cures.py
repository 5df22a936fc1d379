"""A value of a wrong type is met with what the key may be, and its default; the name of a group with its names."""

import pytest

from gpt4moe.config.cures import type_cure
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError


def refusal(overrides: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run_config(overrides)
    return caught.value


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("training.steps=abc", "training.steps is a whole number."),
        ("optimizer.lr=[1]", "optimizer.lr is a number"),
        ("checkpoint.keep=x", "checkpoint.keep is a whole number; its default is 3."),
        ("training.deterministic=x", "training.deterministic is true or false; its default is false."),
        ("model.head_dim=x", "model.head_dim is a whole number or null; its default is null."),
        ("run.seed={a: 1}", "run.seed is a whole number; its default is 1234."),
        ("training.steps=2.5k", "training.steps is a whole number. Write 2500."),
        ("optimizer.lr=3k", "optimizer.lr is a number. Write 3e3."),
        ("resilience.on_nonfinite=x", "resilience.on_nonfinite is one of skip, go_back, stop; its default is stop."),
        ("run.name=$(touch x)", "Use letters, digits and - _ . , = + @"),
        ("run.name=a, b", "Use letters, digits and"),
        ("training.stepz=3", "Did you mean training.steps?"),
        ("a=[", "a value with other letters than of words in quotes"),
    ],
)
def test_the_cure_of_a_wrong_type_says_the_right_one(override: str, cure: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_run_config(["+experiment=tiny", "data=mock", "run.name=x", override])
    assert cure in refused.value.cure and "\n" not in refused.value.cause


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("tracking.wandb", "tracking.wandb is one of offline, online, disabled; its default is offline."),
        ("training.sample_prompts", "a list ([A,B]), each entry a text"), ("training.sample_prompts[0]", "a text"),
        ("training.batch_ramp[0].global_batch_size", "a whole number"), ("model.moe", "a group with the keys num"),
    ],
)  # fmt: skip
def test_every_key_has_words(key: str, said: str) -> None:
    assert said in (type_cure(RunConfig, key) or "")
    assert type_cure(RunConfig, "no.such") is None


@pytest.mark.parametrize(
    ("short", "whole"),
    [("h100", "h100_80g"), ("H200", "h200_141g"), ("MI300X", "mi300x"), ("rtx-4090", "rtx4090"),
     ("'h100'", "h100_80g"), ('"H200"', "h200_141g")],
)  # fmt: skip
def test_a_short_name_stands_for_the_one_cluster_that_has_it(short: str, whole: str) -> None:
    assert load_run_config(["run.name=x", "training.steps=1", f"cluster={short}"]).cluster.name == whole


def test_a_short_name_of_several_clusters_is_refused_with_all_of_them() -> None:
    error = refusal(["run.name=x", "training.steps=1", "cluster=a100"])
    assert "a100_40g or a100_80g" in error.cause and error.cure == "Set cluster=a100_40g or cluster=a100_80g."
    assert "h100_80g" in refusal(["run.name=x", "training.steps=1", "cluster=h1000"]).cure
    assert "Leave the plus out: cluster=" in refusal(["run.name=x", "training.steps=1", "+cluster=h100"]).cure


@pytest.mark.parametrize(
    "override", ["cluster=null", "stage=null", "+experiment=null", "cluster=5", "router@model.moe.router=true"]
)
def test_a_group_that_is_given_no_name_is_refused_with_its_names(override: str) -> None:
    error = refusal(["run.name=x", "training.steps=1", override])
    assert error.cause.startswith(f"{override}: ")
    assert any(f" {name}" in error.cure for name in ("h100_80g", "sft", "tiny", "switch"))
