"""to-hf: what transformers makes of an export, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from gpt4moe.config.load import load_run_config
from gpt4moe.convert.architectures import architecture_of
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.environment import Environment
from tests.convert.logits import our_logits, their_logits
from tests.spawn import run_ranks
from tests.training.command import train


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("trained", "MixtralForCausalLM"), ("tied", "MixtralForCausalLM"), ("normed", "Qwen3MoeForCausalLM")],
)
def test_an_export_loads_strictly_and_gives_our_logits(
    name: str, architecture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    answer = to_huggingface(run, tmp_path / "hf", dtype="fp32")
    assert answer["architecture"] == architecture
    logits, info = their_logits(tmp_path / "hf")
    assert not any(info.values()), info  # nothing missing, unexpected, mismatched
    ours = our_logits(run)
    # Sums in another order; a swapped gate and up, or q and k, would show at 0.1.
    assert np.abs(logits - ours).max() < 1e-4
    assert np.abs(ours).max() > 0.5
    assert answer["size_bytes"] == 4 * answer["parameters"]


def test_small_shards_and_one_file_hold_the_same_model(tmp_path: Path, trained: Path) -> None:
    to_huggingface(trained, tmp_path / "one", dtype="fp32")
    answer = to_huggingface(trained, tmp_path / "many", dtype="fp32", max_shard_bytes=20_000)
    assert len(answer["files"]) > 5 and max(file["size_bytes"] for file in answer["files"]) < 40_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file["name"] for file in answer["files"]}
    assert np.array_equal(their_logits(tmp_path / "one")[0], their_logits(tmp_path / "many")[0])


def test_bf16_is_half_the_size_and_near(tmp_path: Path, trained: Path) -> None:
    answer = to_huggingface(trained, tmp_path / "hf")
    assert answer["dtype"] == "bfloat16" and answer["size_bytes"] == 2 * answer["parameters"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    # The median: rounding may send a single token to another expert.
    assert 1e-5 < np.median(np.abs(their_logits(tmp_path / "hf")[0] - our_logits(trained))) < 0.01


def test_the_tokenizer_comes_along_with_its_end_of_text(tmp_path: Path, trained: Path, corpus: Path) -> None:
    to_huggingface(trained, tmp_path / "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(corpus / "tokenizer.json")
    text = "word 17 and\tthings,  é\n"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / name).read_text())
        assert (content["eos_token_id"], content["pad_token_id"], content["bos_token_id"]) == (ours.eos_id, 0, None)


def test_the_config_says_rope_twice_and_the_card_names_the_run(tmp_path: Path, trained: Path) -> None:
    to_huggingface(trained, tmp_path / "hf", licence="mit")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    card = (tmp_path / "hf" / "README.md").read_text()
    run_id = json.loads((trained / "identity.json").read_text())["run_id"]
    assert "license: mit" in card and run_id in card and "alpha (24 samples)" in card


def test_a_dry_run_says_the_sizes_and_writes_nothing(tmp_path: Path, trained: Path) -> None:
    planned = to_huggingface(trained, tmp_path / "hf", max_shard_bytes=20_000, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert to_huggingface(trained, tmp_path / "hf", max_shard_bytes=20_000) == planned
    for file in planned["files"]:
        assert 0 < (tmp_path / "hf" / file["name"]).stat().st_size - file["size_bytes"] < 4000  # the header


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("model.moe.layer_pattern=[0,1]", "model.ffn_hidden_size=48"), "model.moe.layer_pattern"),
        (("router@model.moe.router=switch", "model.moe.top_k=1"), "model.moe.router.kind=switch"),
    ],
)
def test_what_mixtral_cannot_say_is_refused_by_its_field(
    overrides: tuple[str, ...], field: str, tmp_path: Path
) -> None:
    (ended,) = train(tmp_path / "run", "training.steps=1", *overrides)
    assert ended.status == 0, ended.err
    with pytest.raises(ConversionError, match=field):
        to_huggingface(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "field",
    [
        "model.moe.router.kind=sigmoid_bias",
        "model.moe.router.kind=group_limited",
        "model.moe.router.scaling_factor=2.5",
        "model.moe.shared_expert_ffn_hidden_size=64",
    ],
)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["mixtral", "qwen3_moe"])
def test_what_no_router_of_theirs_does_is_refused_by_its_field(field: str, qk_norm: bool) -> None:
    groups = ["model.moe.router.num_groups=4", "model.moe.router.group_topk=2"] if "group" in field else []
    model = load_run_config(["+experiment=tiny", "run.name=x", f"model.qk_norm={qk_norm}", field, *groups]).model
    with pytest.raises(ConversionError, match=field):
        architecture_of(model)


def test_a_gone_tokenizer_is_asked_for(tmp_path: Path, trained: Path, corpus: Path) -> None:
    hidden = corpus.with_name("hidden")
    os.rename(corpus, hidden)
    try:
        with pytest.raises(ConversionError, match="--tokenizer"):
            to_huggingface(trained, tmp_path / "hf")
        to_huggingface(trained, tmp_path / "hf", tokenizer=hidden / "tokenizer.json")
    finally:
        os.rename(hidden, corpus)
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def _strict_refusal(environment: Environment, folder: Path) -> str:
    from gpt4moe.inference.logits import load_strictly

    with pytest.raises(ConversionError) as caught:
        load_strictly(folder)
    return f"{caught.value.cause} {caught.value.cure}"


def test_a_strict_load_refuses_what_transformers_would_fill_with_random_numbers(tmp_path: Path, mixtral: Path) -> None:
    folder = shutil.copytree(mixtral, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (cause,) = run_ranks(1, _strict_refusal, folder)
    assert "missing keys" in cause and "k_proj" in cause and "Another folder: download it whole" in cause
