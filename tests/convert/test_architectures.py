"""architectures.py: a model finds its architecture in the table, and a new architecture is one row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.convert import architectures
from gpt4moe.convert.architectures import ARCHITECTURES, Architecture, architecture_of, known_names
from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.tables import LLAMA
from gpt4moe.errors import ConversionError
from tests.convert.hf_models import save_model
from tests.convert.logits import our_logits, their_logits

DENSE_MODEL = ["model.moe=null", "model.ffn_hidden_size=48"]
SOME_DENSE = ["model.moe.layer_pattern=[0,1,1,1]", "model.num_layers=4", "model.ffn_hidden_size=48"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], "mixtral"),
        (["model.qk_norm=true"], "qwen3_moe"),
        ([*SOME_DENSE, "model.qk_norm=true"], "qwen3_moe"),
        (["model.moe.dense_first_layers=1", "model.ffn_hidden_size=48", "model.qk_norm=true"], "qwen3_moe"),
        (DENSE_MODEL, "llama"),
        ([*DENSE_MODEL, "model.qk_norm=true"], "qwen3"),
    ],
)
def test_a_model_is_exported_as_the_first_architecture_that_holds_it(overrides: list[str], wanted: str) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x", *overrides])
    assert architecture_of(run.model).model_type == wanted


def test_a_refusal_names_the_field_and_the_nearest_architecture() -> None:
    for qk_norm, name in ((False, "Mixtral"), (True, "Qwen3-MoE")):
        overrides = [f"model.qk_norm={qk_norm}", "model.moe.router.kind=sigmoid_bias"]
        run = load_run_config(["+experiment=tiny", "run.name=x", *overrides])
        with pytest.raises(ConversionError, match=rf"model.moe.router.kind=sigmoid_bias: {name}, the nearest"):
            architecture_of(run.model)


def test_layers_made_dense_by_their_number_are_refused_too() -> None:
    overrides = ["model.moe.dense_first_layers=1", "model.ffn_hidden_size=48"]
    run = load_run_config(["+experiment=tiny", "run.name=x", *overrides])
    with pytest.raises(ConversionError, match=r"makes layers \[0\] dense: Mixtral"):
        architecture_of(run.model)


# Ministral (transformers 5) has Llama's tensors, under another model_type.
MINISTRAL = Architecture(
    name="Ministral", model_type="ministral", class_name="MinistralForCausalLM", rows=LLAMA,
    constants={"sliding_window": 2**17},
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        # Tensors named as Llama's, and a forward pass of their own.
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling=8.0|embedding_multiplier|attention_multiplier"),
        (
            "SmolLM3",
            {"no_rope_layers": [1, 0], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "no_rope_layer",
        ),
    ],
)
def test_a_row_that_forgets_a_setting_converts_nothing(
    kind: str, settings: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "hf", kind, **settings)
    row = Architecture(name=kind, model_type=kind.lower(), class_name=f"{kind}ForCausalLM", rows=LLAMA, constants={})
    monkeypatch.setattr(architectures, "ARCHITECTURES", ARCHITECTURES | {row.model_type: row})
    with pytest.raises(ConversionError, match=rf"nothing here reads ({named})") as caught:
        from_huggingface(source, tmp_path / "ours")
    assert "`required`" in caught.value.cure
    assert not (tmp_path / "ours").exists()


def test_a_new_architecture_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "hf", "Ministral", sliding_window=64, head_dim=8)
    with pytest.raises(ConversionError, match="model_type=ministral is another architecture") as caught:
        from_huggingface(source, tmp_path / "ours")
    assert caught.value.cure == f"Convert a {known_names()} folder."
    # First in the table, so that a dense model is exported as this one.
    monkeypatch.setattr(architectures, "ARCHITECTURES", {"ministral": MINISTRAL} | ARCHITECTURES)
    from_huggingface(source, tmp_path / "ours")
    wanted, _ = their_logits(source)
    assert np.abs(wanted).max() > 0.5
    assert np.abs(our_logits(tmp_path / "ours") - wanted).max() < 1e-4
    assert to_huggingface(tmp_path / "ours", tmp_path / "back", dtype="fp32")["architecture"] == "MinistralForCausalLM"
    back, info = their_logits(tmp_path / "back")
    assert not any(info.values()), info
    assert np.array_equal(back, wanted)


def test_the_list_in_a_refusal_is_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    *names, last = (architecture.name for architecture in ARCHITECTURES.values())
    assert known_names() == f"{', '.join(names)} or {last}"
    monkeypatch.setattr(architectures, "ARCHITECTURES", ARCHITECTURES | {"ministral": MINISTRAL})
    assert known_names() == f"{', '.join(names)}, {last} or Ministral"
