"""Our calls of Hydra's parts against hydra.compose."""

import json

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import OmegaConf

from gpt4moe.config.compose import VERSION_BASE, compose
from gpt4moe.config.load import CONFIG_FOLDER, config_to_dict, load_plan_config, load_run_config
from gpt4moe.config.run import RunConfig

CASES = {
    **{file.stem: [f"+experiment={file.stem}"] for file in sorted((CONFIG_FOLDER / "experiment").glob("*.yaml"))},
    "a group within a group": ["router@model.moe.router=sigmoid_bias", "parallel=tp2_pp2_ep2"],
    "a group that is added": ["+vision@model.vision=tiny", "++data.sources.more={weight: 2}"],
    "values of every kind": [
        "training.steps=12", "run.name='a b'", "cluster.usd_per_hour=null", "stage.train=['*norm*']",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def schemas() -> None:
    load_run_config(["+experiment=tiny", "run.name=a"])
    load_plan_config([])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["train", "plan"])
def test_a_config_is_what_hydra_composes(name: str, case: str) -> None:
    ours = compose(CONFIG_FOLDER, name, CASES[case])
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=VERSION_BASE):
        theirs = hydra_compose(name, CASES[case])
    assert ours == theirs
    assert list(ours) == list(theirs)
    for key in ("model", "data", "optimizer"):
        assert OmegaConf.get_type(ours, key) is OmegaConf.get_type(theirs, key)


@pytest.mark.parametrize("case", CASES)
def test_plain_data_is_what_omegaconf_makes_of_the_objects(case: str) -> None:
    run = load_run_config([*CASES[case], "run.name=a"]) if "experiment" in str(CASES[case]) else RunConfig()
    run.optimizer.lr = 1  # an int where a float belongs, as code may set it
    run.stage.train = ["*norm*"]
    theirs = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    assert config_to_dict(run) == theirs
    assert json.dumps(config_to_dict(run)) == json.dumps(theirs)


@pytest.mark.parametrize(
    "overrides",
    [["model=no_such_one"], ["no_such_group=a"], ["training.stepz=3"], ["training.steps=soon"], ["training.steps=1,2"],
     ["model"], ["+model=tiny"], ["parallel.tp=[1"]],
)  # fmt: skip
def test_what_hydra_refuses_is_refused_with_its_words(overrides: list[str]) -> None:
    with pytest.raises(HydraException) as ours:
        compose(CONFIG_FOLDER, "train", overrides)
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=VERSION_BASE), pytest.raises(HydraException) as theirs:
        hydra_compose("train", overrides)
    assert type(ours.value) is type(theirs.value)
    if type(ours.value) is not ConfigCompositionException:
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]
