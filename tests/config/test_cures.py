"""A value of a wrong type is met with what the key may be, and its default."""

import pytest

from gpt4moe.config.cures import type_cure
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("training.steps=abc", "training.steps is a whole number."),
        ("optimizer.lr=[1]", "optimizer.lr is a number"),
        ("checkpoint.keep=x", "checkpoint.keep is a whole number; its default is 3."),
        ("training.deterministic=x", "training.deterministic is true or false; its default is false."),
        ("model.head_dim=x", "model.head_dim is a whole number or null; its default is null."),
        ("run.seed={a: 1}", "run.seed is a whole number; its default is 1234."),
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
