"""A config as it was stored is read without OmegaConf, and comes out as with it."""

from typing import Any

import pytest

from gpt4moe.config.load import CONFIG_FOLDER, config_from_dict, config_to_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.config.stored import from_stored
from gpt4moe.errors import ConfigError

EXPERIMENTS = sorted(file.stem for file in (CONFIG_FOLDER / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_stored_config_is_read_as_omegaconf_reads_it(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = config_to_dict(load_run_config([f"+experiment={experiment}", "run.name=x"]))
    stored = from_stored(RunConfig, raw)
    assert stored is not None
    monkeypatch.setattr("gpt4moe.config.load.from_stored", lambda schema, raw: None)
    assert repr(stored) == repr(config_from_dict(raw))  # not ==, for which 1 is 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [("seq_length", 3.0), ("seq_length", True), ("init_std", 1), ("tied_embeddings", 1), ("name", "${run.name}"),
     ("name", "???"), ("moe", []), ("num_layers", None), ("other", 1), ("name", ...)],
)  # fmt: skip
def test_another_form_is_left_to_omegaconf(key: str, value: Any) -> None:
    raw = config_to_dict(load_run_config(["+experiment=tiny", "run.name=x"]))
    if value is ...:
        del raw["model"][key]
    else:
        raw["model"][key] = value
    assert from_stored(RunConfig, raw) is None


def test_a_stored_config_of_the_right_form_is_checked_as_any() -> None:
    raw = config_to_dict(load_run_config(["+experiment=tiny", "run.name=x"]))
    raw["model"]["hidden_size"] = 3
    assert from_stored(RunConfig, raw) is not None
    with pytest.raises(ConfigError, match="hidden_size"):
        config_from_dict(raw)
