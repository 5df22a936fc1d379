"""from-hf: folders of others as checkpoints of ours; upcycling."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt4moe.checkpoint.inspection import verification
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.convert.from_huggingface import Upcycling, from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.errors import ConversionError
from tests.convert.hf_models import MIXTURE, QWEN3_MOE, fuse, save_model
from tests.convert.logits import our_logits, their_logits
from tests.training.command import metrics, train


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mixtral", MIXTURE),
        ("Mixtral", MIXTURE | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("Mixtral", MIXTURE | {"dtype": "bfloat16", "num_key_value_heads": 4}),
        ("Llama", {"rms_norm_eps": 1e-4}),
        ("Mistral", {"sliding_window": 64}),
        ("Qwen3Moe", QWEN3_MOE),
        ("Qwen3Moe", QWEN3_MOE | {"tie_word_embeddings": True, "mlp_only_layers": [0]}),
        ("Qwen3Moe", QWEN3_MOE | {"decoder_sparse_step": 2}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_a_folder_becomes_a_checkpoint_of_the_same_logits(
    kind: str, settings: dict[str, object], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "hf", kind, **settings)
    from_huggingface(source, tmp_path / "step-00000000")
    assert verification(tmp_path / "step-00000000")["problems"] == []
    wanted, _ = their_logits(source)
    assert np.abs(wanted).max() > 0.5
    assert np.abs(our_logits(tmp_path / "step-00000000") - wanted).max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "settings", "of_a_layer"),
    [("Mixtral", MIXTURE, 7), ("Qwen3Moe", QWEN3_MOE, 9)],
    ids=["mixtral", "qwen3-moe"],
)
def test_fused_and_sharded_folders_give_the_same_checkpoint(
    kind: str, settings: dict[str, object], of_a_layer: int, tmp_path: Path
) -> None:
    plain = save_model(tmp_path / "plain", kind, **settings)
    many = save_model(tmp_path / "many", kind, shard_size="20KB", **settings)
    assert len(list(many.glob("*.safetensors"))) > 3
    fused = save_model(tmp_path / "fused", kind, **settings)
    fuse(fused)
    states = []
    for folder in (plain, many, fused):
        from_huggingface(folder, folder / "ours")
        reader = CheckpointReader(folder / "ours")
        states.append({name: reader.tensor(name) for name in reader.shapes})
    assert len(states[0]) == 3 + 2 * of_a_layer
    for state in states[1:]:
        assert all(state[name].equal(tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mixtral", MIXTURE),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen3Moe", QWEN3_MOE | {"mlp_only_layers": [1]}),
    ],
)
def test_there_and_back_is_the_same_bits(kind: str, settings: dict[str, object], tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", kind, **settings)
    from_huggingface(source, tmp_path / "ours")
    to_huggingface(tmp_path / "ours", tmp_path / "back", dtype="fp32")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_training_goes_on_from_a_converted_folder_on_another_layout(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "Mixtral", **MIXTURE)
    from_huggingface(source, tmp_path / "ours")
    shape = (
        "model.num_attention_heads=4", "model.num_query_groups=2", "model.moe.ffn_hidden_size=48",
        "model.rope_theta=50000", "training.steps=1", f"checkpoint.load={tmp_path / 'ours'}",
    )  # fmt: skip
    one = train(tmp_path / "one", *shape)
    four = train(tmp_path / "four", *shape, "parallel.tp=2", "parallel.pp=2", "parallel.ep=2", ranks=4)
    assert (one[0].status, four[0].status) == (0, 0), one[0].err + four[0].err
    assert "weights" in one[0].out
    assert metrics(tmp_path / "one")[0]["loss"] == pytest.approx(metrics(tmp_path / "four")[0]["loss"], abs=1e-5)


def test_an_upcycled_model_says_what_the_dense_one_said(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "Llama", rms_norm_eps=1e-5)
    from_huggingface(source, tmp_path / "ours", Upcycling(num_experts=8, top_k=2))
    wanted, _ = their_logits(source)
    assert np.abs(our_logits(tmp_path / "ours") - wanted).max() < 1e-4
    reader = CheckpointReader(tmp_path / "ours")
    router = reader.tensor("weight/decoder.layers.1.mlp.router.weight")
    assert router.shape == (8, 32) and 0.08 < router.std() < 0.12  # initializer_range


def test_upcycling_noise_spares_the_first_expert_and_follows_the_seed(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "Llama")
    gate_up = {}
    for name, upcycling in {
        "plain": Upcycling(num_experts=4),
        "noisy": Upcycling(num_experts=4, noise=0.1),
        "again": Upcycling(num_experts=4, noise=0.1),
        "other": Upcycling(num_experts=4, noise=0.1, seed=7),
    }.items():
        from_huggingface(source, tmp_path / name, upcycling)
        reader = CheckpointReader(tmp_path / name)
        gate_up[name] = reader.tensor("weight/decoder.layers.0.mlp.experts.gate_up")
    assert all(gate_up["plain"][expert].equal(gate_up["plain"][0]) for expert in range(4))
    assert gate_up["noisy"][0].equal(gate_up["plain"][0])
    noise = gate_up["noisy"][1:] - gate_up["plain"][1:]
    assert 0.008 < noise.std() < 0.012  # a tenth of initializer_range
    assert gate_up["again"].equal(gate_up["noisy"]) and not gate_up["other"].equal(gate_up["noisy"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2_moe"}, "shared expert"),
        ({"model_type": "qwen3_moe"}, "norm_topk_prob=None"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 16}, r"q_proj.weight is \[32, 32\], config.json says \[64, 32\]"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types"),
        ({"intermediate_size": 40}, "w1.weight is"),
        ({"num_local_experts": 5}, "gate.weight is"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "unknown meaning"),
        ({"rope_theta": 7.0}, "rope_theta"),
        ({"logits_scaling": 8.0, "no_rope_layers": [1, 0]}, r"reads logits_scaling=8.0.*Nor no_rope_layers\."),
    ],
)
def test_another_architecture_is_refused_by_its_field(
    changes: dict[str, object], named: str, mixtral: Path, tmp_path: Path
) -> None:
    mixtral = shutil.copytree(mixtral, tmp_path / "hf")
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConversionError, match=named):
        from_huggingface(mixtral, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("generation", [None, {"eos_token_id": [2, 7], "temperature": 0.6}])
def test_special_tokens_and_tokenizer_files_come_back(
    generation: dict[str, object] | None, tmp_path: Path, mixtral: Path
) -> None:
    source = shutil.copytree(mixtral, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    special = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    (source / "config.json").write_text(json.dumps(config | special))
    (source / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "tokenizer.model").write_bytes(b"\xff\x00not text")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    from_huggingface(source, tmp_path / "ours")
    to_huggingface(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "back" / name).read_text())
        assert {key: content[key] for key in special} == special
    assert generation is None or content["temperature"] == 0.6
    for name in ("tokenizer.model", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
