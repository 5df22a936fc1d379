"""The door: what composes, and what is refused in one line of cause and one of cure."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt4moe.config.load import CONFIG_FOLDER, config_from_dict, config_to_dict, config_to_yaml, load_run_config
from gpt4moe.config.moe import RouterKind
from gpt4moe.config.optimizer import Dtype
from gpt4moe.errors import ConfigError

TINY = ["+experiment=tiny", "run.name=x"]
EXPERIMENTS = sorted(file.stem for file in (CONFIG_FOLDER / "experiment").glob("*.yaml"))
GROUP_FILES = sorted(
    file.relative_to(CONFIG_FOLDER) for file in CONFIG_FOLDER.glob("*/*.yaml") if file.parent.name != "experiment"
)
SIGMOID, GROUPS = "router@model.moe.router=sigmoid_bias", "router@model.moe.router=group_limited"
# A group file that needs company: what else the run must say.
COMPANY = {
    "router/switch": ["model.moe.top_k=1"],
    "kernels/nvidia": ["precision=bf16"],
    "stage/vision": ["+vision@model.vision=tiny"],
}


def refusal(overrides: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run_config(overrides)
    return caught.value


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_validates(experiment: str) -> None:
    run = load_run_config([f"+experiment={experiment}", "run.name=x"])
    assert run.training.steps > 0


def test_a_document_mask_of_conversations_is_refused() -> None:
    assert "data.pack" in refusal([*TINY, "stage=sft", "data.document_mask=true"]).cure


@pytest.mark.parametrize("file", GROUP_FILES, ids=str)
def test_every_group_file_is_reachable(file: Path) -> None:
    group, choice = file.parent.as_posix(), file.stem
    key = {"router": "router@model.moe.router", "vision": "+vision@model.vision"}.get(group, group)
    run = load_run_config(["run.name=x", "training.steps=1", f"{key}={choice}", *COMPANY.get(f"{group}/{choice}", [])])
    chosen: Any = run.model.moe.router if group == "router" and run.model.moe else getattr(run, group, run.model.vision)
    written = yaml.safe_load((CONFIG_FOLDER / file).read_text()) or {}
    if group == "stage" and "stage" in written:  # a stage that sets keys of other groups too
        assert [one.tensors for one in run.optimizer.by_pattern] == [
            one["tensors"] for one in written["optimizer"]["by_pattern"]
        ]
        written = written["stage"]
    for name, value in written.items():
        if name not in ("defaults", "moe", "top_k"):
            loaded = getattr(chosen, name)
            if dataclasses.is_dataclass(loaded):  # model.mla, model.planned
                loaded = {key: getattr(loaded, key) for key in value}
            # PyYAML reads 312.0e12 as a string, OmegaConf as the number it is.
            assert loaded == (float(value) if isinstance(loaded, float) else value), name


@pytest.mark.parametrize(
    ("override", "unknown", "meant"),
    [
        ("model.hiden_size=64", "model.hiden_size", "model.hidden_size"),
        ("+parallel.tpp=2", "parallel.tpp", "parallel.tp"),
        ("++parallel.tpp=2", "parallel.tpp", "parallel.tp"),
        ("+model.moe.router.knd=topk", "model.moe.router.knd", "model.moe.router.kind"),
        ("++trainning.steps=3", "trainning", "training"),
        ("+run.nmae=y", "run.nmae", "run.name"),
    ],
)
def test_a_misspelt_key_names_the_nearest(override: str, unknown: str, meant: str) -> None:
    error = refusal([*TINY, override])
    assert unknown in error.cause
    assert f"Did you mean {meant}?" == error.cure


@pytest.mark.parametrize(
    ("key", "entry", "cause", "cure"),
    [
        ("training.length_ramp", {"seq_len": 64, "until_step": 3}, "seq_len", "Did you mean seq_length?"),
        ("training.batch_ramp", {"x": 64}, "x", "Keys here: global_batch_size, until_samples."),
        ("data.phases", {"from_token": 5}, "from_token", "Did you mean from_tokens?"),
        ("optimizer.by_pattern", {"tensor": "*"}, "tensor", "Did you mean tensors?"),
    ],
)
def test_a_misspelt_key_in_an_entry_of_a_list_names_the_list_and_its_keys(
    key: str, entry: dict[str, Any], cause: str, cure: str
) -> None:
    written = ", ".join(f"{name}: {value!r}" for name, value in entry.items())
    error = refusal([*TINY, f"{key}=[{{{written}}}]"])
    assert (error.cause, error.cure) == (f"Unknown key {cause} in an entry of {key}.", cure)
    raw = config_to_dict(load_run_config(TINY))
    group, name = key.split(".")
    raw[group][name] = [entry]
    with pytest.raises(ConfigError, match=rf"Unknown key {group}\.{name}\[0\]\.{cause}\.") as stored:
        config_from_dict(raw)
    assert stored.value.cure == cure.replace("mean ", f"mean {key}[0].").replace(
        "here: global_batch_size, ", f"here: {key}[0].global_batch_size, {key}[0]."
    )


@pytest.mark.parametrize(
    ("overrides", "cause", "cure"),
    [
        (["+experiment=tiny"], "run.name is not set", "Add run.name=first."),
        (["run.name=x"], "training.steps is not set", "training.steps="),
        ([*TINY, "precision.dtype=fp31"], "precision.dtype", ""),
        ([*TINY, "precision=fp31"], "precision/fp31", "bf16 fp32"),
        ([*TINY, "tracking.wandb=ofline"], "[offline, online, disabled]", ""),
        ([*TINY, "parallel.tp=two"], "parallel.tp", ""),
        ([*TINY, "model.qk_norm=rms"], "model.qk_norm", ""),
        ([*TINY, "training.steps=1.5"], "training.steps", ""),
        ([*TINY, "parallel.layers_per_stage=3"], "parallel.layers_per_stage", ""),
        *(([*TINY, f"optimizer.epsilon={value}"], "optimizer.epsilon", "1e-8") for value in ("-1", "0", "nan", "inf")),
        *(
            ([*TINY, f"model.norm_epsilon={value}"], "model.norm_epsilon", "1e-05")
            for value in ("-1", "0", "nan", "inf")
        ),
        *(([*TINY, f"model.init_std={value}"], "model.init_std", "0.02") for value in ("-1", "1e20", "nan")),
        ([*TINY, "model.rope_theta=-1"], "model.rope_theta=-1", "10000"),
        ([*TINY, "model.num_layers=100000000"], "model.num_layers=100000000", "10000 or fewer"),
        ([*TINY, "tracking.project=${oc.env:HOME}"], "tracking.project is to be read from the environment", "itself"),
        ([*TINY, "+tracking.tags=[${ oc.decode:x}]"], "tracking.tags is to be read from the environment", "itself"),
        *(
            ([*TINY, f"resilience.hang_seconds={value}"], "hang_seconds", "300")
            for value in ("-1", "0.5", "nan", "inf")
        ),
        ([*TINY, "resilience.collective_timeout_minutes=0"], "collective_timeout_minutes=0", "30"),
        ([*TINY, "resilience.hang_seconds=450"], "has seen a hang", "collective_timeout_minutes above 30"),
        ([*TINY, "engine.bucket_size=0"], "engine.bucket_size=0", "null"),
        (["+experiment=tyni", "run.name=x"], "experiment/tyni", "tiny"),
        ([*TINY, "parallel.tp"], "'parallel.tp'", "key=value"),
        ([*TINY, "~run"], "~run removes a part", "Leave it out"),
        ([*TINY, "parallel={tp: 2"], "tp", "override"),
    ],
)
def test_a_bad_value_is_named(overrides: list[str], cause: str, cure: str) -> None:
    error = refusal(overrides)
    assert cause in error.cause
    assert cure in error.cure


@pytest.mark.parametrize(
    ("overrides", "cause", "cured"),
    [
        (["router@model.moe.router=switch"], "model.moe.top_k=2", ["model.moe.top_k=1"]),
        (["model.moe.top_k=17"], "model.moe.num_experts=16", ["model.moe.top_k=16"]),
        (["model.moe.top_k=1"], "gradient", ["router@model.moe.router=switch"]),
        (["model.moe=null"], "4 of 4 layers are dense", ["model.ffn_hidden_size=341"]),
        (["model.moe.layer_pattern=[1,0]"], "2 entries", ["model.moe.layer_pattern=null"]),
        (["model.moe.layer_frequency=0"], "layer_frequency=0", ["model.moe.layer_frequency=1"]),
        (["model.moe.dense_first_layers=4"], "num_layers=4", ["model.moe.dense_first_layers=0"]),
        (
            ["model.moe.layer_frequency=2", "model.moe.layer_pattern=[1,1,1,1]"],
            "both say which",
            ["model.moe.layer_frequency=1"],
        ),
        (
            ["parallel.layers_per_stage=[4]", "parallel.head_counts_as_layer=true"],
            "both say how many",
            ["parallel.layers_per_stage=null"],
        ),
        (["parallel.recompute_layers=1"], "recompute=none", ["parallel.recompute=full"]),
        (["model.num_query_groups=3"], "model.num_attention_heads=4", ["model.num_query_groups=4"]),
        (["model.hidden_size=130"], "32.5", ["model.hidden_size=136"]),
        (["model.hidden_size=130"], "32.5", ["model.head_dim=32"]),
        (["model.head_dim=33"], "model.head_dim=33", ["model.head_dim=128"]),
        (["model.head_dim=0"], "model.head_dim=0", ["model.head_dim=null"]),
        (["model.moe.router.capacity_factor=0"], "without slots", ["model.moe.router.capacity_factor=1.25"]),
        ([SIGMOID, "model.moe.top_k=1"], "kind=sigmoid_bias", ["router@model.moe.router=switch"]),
        ([GROUPS, "model.moe.router.num_groups=3"], "num_experts=16", ["model.moe.router.num_groups=4"]),
        ([GROUPS, "model.moe.router.num_groups=16"], "two best", ["model.moe.router.num_groups=8"]),
        ([GROUPS, "model.moe.router.group_topk=5"], "group_topk=5", ["model.moe.router.group_topk=4"]),
        ([GROUPS, "model.moe.top_k=9"], "top_k=9", ["model.moe.router.group_topk=3"]),
        (["model.moe.router.group_topk=2"], "no groups", ["model.moe.router.group_topk=null"]),
        (["model.moe.router.bias_update_rate=0.001"], "no bias", ["model.moe.router.bias_update_rate=0"]),
        ([SIGMOID, "model.moe.router.bias_update_rate=-1"], "negative", ["model.moe.router.bias_update_rate=0"]),
        (["model.moe.router.input_jitter=1"], "outside [0, 1)", ["model.moe.router.input_jitter=0.01"]),
        (["model.moe.router.scaling_factor=0"], "not above 0", ["model.moe.router.scaling_factor=1.0"]),
        (
            ["model.moe.shared_expert_ffn_hidden_size=0"],
            "below 1",
            ["model.moe.shared_expert_ffn_hidden_size=256"],
        ),
        (["training.check_replicas_every=-1"], "negative", ["training.check_replicas_every=0"]),
        (["training.micro_batch_size=3"], "no multiple of", ["training.micro_batch_size=4"]),
        (["schedule.warmup_steps=201"], "schedule.total_steps=200", ["schedule.total_steps=201"]),
        (["parallel.ep=0"], "parallel.ep=0", ["parallel.ep=1"]),
        (["optimizer.lr=0"], "optimizer.lr=0", ["optimizer.lr=3e-4"]),
        (["data.path=null"], "data.path", ["data=mock"]),
        (["run.name=a/b"], "'a/b'", ["run.name=a-b"]),
        (["checkpoint.load_only=[decoder.*]"], "checkpoint.load is not set", ["checkpoint.load=runs/first"]),
        (["cluster.usd_per_hour=0"], "cluster.usd_per_hour=0", ["cluster=h100_80g", "cluster.usd_per_hour=2"]),
        (["engine.offload_optimizer=true"], "engine.kind=megatron", ["engine=deepspeed"]),
        (["engine.kind=deepspeed"], "overlap_grad_reduce=true", ["engine=deepspeed"]),
        (
            ["engine=deepspeed", "engine.overlap_param_gather=true"],
            "in its own step",
            ["engine.overlap_param_gather=false"],
        ),
        (
            ["engine.overlap_param_gather=true", "engine.overlap_grad_reduce=false"],
            "buckets for engine.overlap_grad",
            ["engine.overlap_grad_reduce=true"],
        ),
        (["engine=deepspeed", "engine.bucket_size=9"], "engine.bucket_size=9", ["engine.bucket_size=null"]),
    ],
)
def test_a_conflict_has_the_numbers_and_its_cure_cures(overrides: list[str], cause: str, cured: list[str]) -> None:
    error = refusal([*TINY, *overrides])
    assert cause in error.cause
    assert load_run_config([*TINY, *overrides, *cured]).run.root == "runs"


@pytest.mark.parametrize("override", ["++x=1", "parallel.tp=two", "model=tyni", "model.num_query_groups=3", "a b=c"])
def test_an_error_is_one_line_of_cause_and_one_of_cure(override: str) -> None:
    error = refusal([*TINY, override])
    cause, cure = str(error).splitlines()
    assert (cause, cure) == (error.cause, error.cure)
    assert cause.strip() and cure.strip()
    assert error.exit_code == 2


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_config_survives_the_way_through_yaml(experiment: str) -> None:
    run = load_run_config([f"+experiment={experiment}", "run.name=x", "parallel.layers_per_stage=null"])
    assert config_from_dict(config_to_dict(run)) == run
    assert config_from_dict(yaml.safe_load(config_to_yaml(run))) == run


def test_a_stored_config_with_an_unknown_key_is_refused() -> None:
    raw = config_to_dict(load_run_config(TINY))
    raw["model"]["hiden_size"] = 3
    with pytest.raises(ConfigError, match=r"model\.hiden_size"):
        config_from_dict(raw)


def test_values_come_out_typed() -> None:
    run = load_run_config([*TINY, "precision=bf16", "model.moe.layer_pattern=[0,1,1,1]", "model.ffn_hidden_size=64"])
    assert run.precision.dtype is Dtype.bf16
    assert run.model.moe is not None and run.model.moe.router.kind is RouterKind.topk
    assert run.model.moe_layers == [False, True, True, True]


def test_two_loads_do_not_see_each_other() -> None:
    load_run_config([*TINY, "parallel.tp=2"])
    assert load_run_config(TINY).parallel.tp == 1


def test_a_key_below_a_null_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="null here"):
        load_run_config(["+experiment=tiny", "run.name=x", "model=dense_tiny", "model.moe.num_experts=4"])


def test_an_entry_that_a_dictionary_does_not_have_yet_says_how_to_add_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(["+experiment=tiny", "run.name=x", "data.sources.web=0.5"])
    assert "++data.sources.web=VALUE" in caught.value.cure
    run = load_run_config(["+experiment=tiny", "run.name=x", "++data.sources.web=0.5"])
    assert run.data.sources == {"web": 0.5}


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_a_learning_rate_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        load_run_config(["+experiment=tiny", "run.name=x", f"optimizer.lr={value}"])


def test_settings_of_hydra_itself_are_refused() -> None:
    for override in ("hydra.run.dir=/tmp/x", "+hydra.jobb.name=3", "++hydra.nosuch.x=1"):
        assert "Hydra's own" in refusal(["+experiment=tiny", "run.name=x", override]).cause


def test_keys_that_clash_in_several_ways_are_named_at_once() -> None:
    overrides = ["router@model.moe.router=switch", "model.moe.router.bias_update_rate=0.1", "parallel.tp=0"]
    error = refusal([*TINY, *overrides])
    cause, cure = str(error).splitlines()
    for at, key in enumerate(("model.moe.top_k=2", "bias_update_rate=0.1", "parallel.tp=0"), start=1):
        assert key in cause.split("(")[at] and f"({at}) Set" in cure
