"""What stage.train and stage.lora name is trained, and a name that is none is refused."""

import pytest

from gpt4moe.architecture.trained import adapter_shapes, describe, require_images, tensor_settings, trained_names
from gpt4moe.config.load import CONFIG_FOLDER, config_from_dict, config_to_dict, load_run_config
from gpt4moe.errors import ConfigError

TINY = (
    "+experiment=tiny", "run.name=x", "data=mock", "model.num_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.moe.num_experts=4",
    "model.moe.ffn_hidden_size=24",
)  # fmt: skip


def test_patterns_name_tensors_as_checkpoint_load_only_does() -> None:
    run = load_run_config([*TINY, "stage.train=['*experts*','decoder.layers.1.input_layernorm.weight']"])
    assert sorted(trained_names(run.model, run.stage)) == [
        "decoder.layers.0.mlp.experts.down", "decoder.layers.0.mlp.experts.gate_up",
        "decoder.layers.1.input_layernorm.weight", "decoder.layers.1.mlp.experts.down",
        "decoder.layers.1.mlp.experts.gate_up",
    ]  # fmt: skip
    assert describe(run.model, run.stage).startswith("trains 5 of 17 tensors, 18,464 of ")


def test_every_target_has_two_matrices_in_every_layer_and_for_every_expert() -> None:
    run = load_run_config([*TINY, "stage.lora.rank=3"])
    layer = {
        "self_attention.linear_proj.lora_a": (3, 32), "self_attention.linear_proj.lora_b": (32, 3),
        "self_attention.linear_qkv.lora_a": (3, 32), "self_attention.linear_qkv.lora_b": (64, 3),
        "mlp.experts.gate_up_lora_a": (4, 3, 32), "mlp.experts.gate_up_lora_b": (4, 2, 24, 3),
        "mlp.experts.down_lora_a": (4, 3, 24), "mlp.experts.down_lora_b": (4, 32, 3),
    }  # fmt: skip
    assert adapter_shapes(run.model) == {
        f"decoder.layers.{index}.{name}": shape for index in range(2) for name, shape in layer.items()
    }
    assert describe(run.model, run.stage).endswith(
        "adapters on 20 matrices: self_attention.linear_proj 2, self_attention.linear_qkv 2, mlp.experts.gate_up 8, "
        "mlp.experts.down 8"
    )


def test_the_adapters_come_back_from_a_manifest() -> None:
    run = load_run_config([*TINY, "stage.lora.rank=3", "stage.lora.targets=['*.1.*linear_qkv*']"])
    again = config_from_dict(config_to_dict(run))
    assert list(adapter_shapes(again.model)) == [
        f"decoder.layers.1.self_attention.linear_qkv.lora_{part}" for part in "ab"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "cause", "cure"),
    [
        (["stage.train=['*expert.s*']"], "*expert.s* matches none of the 17 tensors", "mlp.experts"),
        (["stage.lora.rank=2", "stage.lora.targets=['*lnear_qkv*']"], "stage.lora.targets: *lnear_qkv*", "linear_qkv"),
        (["stage.lora.rank=2", "stage.lora.targets=['*mlp*']"], "mlp.router.weight, which cannot", "narrower"),
        (["stage.lora.rank=2", "stage.train=['*norm*']"], "nothing else is trained", "stage.train=[]"),
        (["stage.lora.rank=2", "stage.lora.dropout=0.1"], "no dropout", "stage.lora.dropout=0"),
        (["optimizer.by_pattern=[{tensors:'*rooter*'}]"], "*rooter* matches none", "router"),
        (["optimizer.by_pattern=[{tensors:'*router*'},{tensors:'*mlp*'}]"], "in two entries, *router* and", "narrower"),
        (["optimizer.by_pattern=[{tensors:'*norm*',lr_factor:-1}]"], "*norm*: lr_factor=-1", "Set lr_factor"),
        (["stage.train=['*norm*']", "optimizer.by_pattern=[{tensors:'*router*'}]"], "*router* matches none", "norm"),
        (["stage.lora.rank=-1"], "negative", "stage.lora.rank=-1"),
        (["stage.lora.targets=['*qkv*']"], "makes no adapters", "stage.lora.rank=16"),
        (["stage.lora.rank=2", "checkpoint.load=x", "checkpoint.load_only=['*']"], "would be frozen", "load_only=[]"),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides: list[str], cause: str, cure: str) -> None:
    with pytest.raises(ConfigError) as error:
        run = load_run_config([*TINY, *overrides])
        trained_names(run.model, run.stage)
        tensor_settings(run.model, run.stage, run.optimizer)
    assert cause in error.value.cause
    assert cure in f"{error.value.cause} {error.value.cure}"


def test_the_page_on_lora_has_what_its_commands_print() -> None:
    page = " ".join((CONFIG_FOLDER.parent / "docs" / "lora.md").read_text().split())
    part, adapted = (
        describe(run.model, run.stage)
        for run in (
            load_run_config(["+experiment=tiny", "run.name=x", "data=mock", more])
            for more in ("stage.train=['*experts*']", "stage.lora.rank=8")
        )
    )
    assert f"`{part}`" in page and f"`{adapted.partition('; ')[2]}`" in page


@pytest.mark.parametrize("pattern", ["*routre*", "*mlp*", "*norm*", "embedding", "*output_layer*"])
def test_the_name_that_a_cure_proposes_for_an_adapter_may_have_one(pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        run = load_run_config([*TINY, "stage.lora.rank=2", f"stage.lora.targets=['{pattern}']"])
        trained_names(run.model, run.stage)
    proposed = error.value.cure.rpartition("such as ")[2].rstrip(".")
    run = load_run_config([*TINY, "stage.lora.rank=2", f"stage.lora.targets=['{proposed}']"])
    assert len(trained_names(run.model, run.stage)) == 2


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("patterns", ["[]", "['decoder.layers.*']"])
def test_a_stage_without_images_trains_no_vision_parts(stage: str, patterns: str) -> None:
    vision = (*TINY, "+vision@model.vision=tiny", f"stage.kind={stage}", "data.path=[x]", "data.kind=indexed")
    run = load_run_config([*vision, f"stage.train={patterns}"])
    with pytest.raises(ConfigError, match=rf"stage={stage} reads no images, .*gated_cross_attention") as refused:
        require_images(run.model, run.stage)
    assert "Set stage=vision" in refused.value.cure
    run = load_run_config([*vision, "stage.train=['*experts*']"])
    require_images(run.model, run.stage)
