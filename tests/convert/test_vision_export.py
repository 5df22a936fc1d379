"""to-hf of a vision model: vision/ beside the text model; examples/load_vision.py gives our logits without gpt4moe."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpt4moe.convert.command_line import status
from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.publish import Draft
from gpt4moe.convert.verify import DIFFERENCES, open_weights, verify
from gpt4moe.data.image_tokens import encode_parts, split_tags
from gpt4moe.data.tokenizer import load_tokenizer, train_tokenizer
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.environment import Environment
from tests.convert.vision_case import (
    IMAGE_ID,
    PARTS,
    ROOT,
    SIZES,
    Case,
    example,
    our_logits,
    pictures,
    rows_of,
    their_logits,
    with_config,
)
from tests.training.command import contents, train

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [f"word{i} and other_{i % 7} things, 12 + {i}?\n" for i in range(200)]
    train_tokenizer(texts, vocab_size=300, special=["<image>"]).backend.save(str(path))
    assert load_tokenizer(path).backend.token_to_id("<image>") == IMAGE_ID
    return path


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the vision stage of a mixture of experts, with gates far from 0."""
    folder = tmp_path_factory.mktemp("runs") / "seen"
    (ended,) = train(folder, *SIZES, *PARTS)
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def exported(seen: Path, tokenizer: Path) -> Path:
    out = seen.parent / "exported"
    to_huggingface(seen, out, dtype="fp32", tokenizer=tokenizer)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("pictures"), 4)


@pytest.fixture(scope="module")
def cases(files: list[Path]) -> list[Case]:
    """Two images; the same two swapped; a clip; an image, two clips; text alone; an image before any text."""
    a, b, c, d = files
    rows = rows_of([[a], [b]], [[b], [a]], [[a, b, c]], [[d], [c, b], [a, d]], [])
    return [*rows, (rows[0][0][4:8], [[a]])]


def test_the_loader_gives_the_logits_of_our_own_model(seen: Path, exported: Path, cases: list[Case]) -> None:
    ours, theirs = our_logits(seen, IMAGE_ID, cases), their_logits(exported, cases)
    for number, (own, their) in enumerate(zip(ours, theirs, strict=True)):
        assert own.shape == their.shape
        assert np.abs(own - their).max() < TOLERANCE, number
    gap = np.abs(theirs[0] - theirs[1]).max(axis=1)
    assert gap[:4].max() == 0, "text before the first image sees none"
    assert gap[4:].max() > 0.01, "other images, other logits"
    assert np.abs(theirs[2] - their_logits(exported, [(cases[2][0], [cases[2][1][0][:1]])])[0]).max() > 1e-3


def test_with_gates_at_0_the_export_is_the_text_model(exported: Path, cases: list[Case]) -> None:
    for away, open_away in their_logits(exported, cases[:2], _closed):
        assert away == 0 and open_away > 0.01


@torch.no_grad()
def _closed(environment: Environment, folder: Path, cases: list[Case]) -> list[tuple[float, float]]:
    """Of each case: the largest difference to the text model alone, of gates at 0 and of those as trained."""
    from transformers import AutoModelForCausalLM

    model = example().VisionModel(folder)
    text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [torch.tensor(tokens) for tokens, _ in cases]
    as_trained = [model.logits(row, images) for row, (_, images) in zip(rows, cases, strict=True)]
    for name in model.weights:
        if "alpha" in name:
            model.weights[name] = torch.zeros(1)
    closed = [model.logits(row, images) for row, (_, images) in zip(rows, cases, strict=True)]
    alone = [text(row.unsqueeze(0)).logits[0] for row in rows]
    return [((x - z).abs().max().item(), (y - z).abs().max().item())
            for x, y, z in zip(closed, as_trained, alone, strict=True)]  # fmt: skip


def test_the_example_generates_without_gpt4moe(exported: Path, files: list[Path], tokenizer: Path) -> None:
    prompt = "word1 <image> and <image>"
    words = load_tokenizer(tokenizer)
    tokens = encode_parts(words, split_tags(prompt), IMAGE_ID).tolist()
    (new,) = their_logits(exported, [(tokens, [[files[0]], files[1:3]])], _greedy)
    assert len(new) > 2
    code = (
        "import sys, runpy; sys.modules['gpt4moe'] = None; sys.argv.pop(0); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--image", files[0], "--image", f"{files[1]},{files[2]}", "--prompt", prompt, "--max-new-tokens", "6"]
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "examples" / "load_vision.py", exported, *arguments],
        cwd=exported.parent, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == words.decode(new) + "\n"


def _greedy(environment: Environment, folder: Path, cases: list[Case]) -> list[list[int]]:
    """Tokens by whole forward passes, without a cache; the example's own are the same."""
    model, found = example().VisionModel(folder), []
    for tokens, images in cases:
        row = torch.tensor(tokens)
        for _ in range(6):
            scores = model.logits(row, images)[-1]
            scores[IMAGE_ID] = -torch.inf
            row = torch.cat((row, scores.argmax().view(1)))
        new = row[len(tokens) :].tolist()
        ends = new.index(0) if 0 in new else len(new)
        assert model.generate(torch.tensor(tokens), images, 6) == new[:ends]
        assert model.tokens("word1 <image> and <image>").tolist() == tokens
        found.append(new[:ends])
    return found


def test_without_a_tokenizer_or_an_image_token_the_example_reads_texts_and_says_what_is_missing(
    seen: Path, exported: Path, cases: list[Case], tmp_path: Path
) -> None:
    to_huggingface(seen, tmp_path / "bare", dtype="fp32")
    text, refused = their_logits(tmp_path / "bare", cases[3:5], _bare)
    assert np.abs(text - their_logits(exported, cases[4:5])[0]).max() == 0
    assert "no tokenizer.json" in refused[0] and "--image-token" in refused[1]


def _bare(environment: Environment, folder: Path, cases: list[Case]) -> list[Any]:
    """Logits of a text; what is said to a prompt, and to images."""
    model, said = example().VisionModel(folder), []
    (tokens, images), (text, _) = cases
    for asked in (lambda: model.tokens("word1"), lambda: model.logits(torch.tensor(tokens), images)):
        with pytest.raises(ValueError) as refused:
            asked()
        said.append(str(refused.value))
    model.generate(torch.tensor(text), [], 2)
    return [model.logits(torch.tensor(text), []).numpy(), said]


def test_files_have_the_documented_names_and_sums(exported: Path) -> None:
    vision = exported / "vision"
    config = json.loads((vision / "config.json").read_text())
    assert config["layers"] == [0, 2] and (config["image_token"], config["image_token_id"]) == ("<image>", IMAGE_ID)
    assert config["preprocessing"]["mean"] == [0.5, 0.5, 0.5] and config["resampler"]["max_frames"] == 8
    names = set(load_file(vision / "model.safetensors"))
    assert {"perceiver_resampler.latents", "perceiver_resampler.time_embeddings",
            "perceiver_resampler.blocks.1.0.context_layer_norm.bias", "gated_cross_attn_layers.1.alpha_dense",
            "gated_cross_attn_layers.1.cross_attn.k_proj.weight"} <= names  # fmt: skip
    assert len(names) == 4 + 2 * 12 + 2 * 11, "the rest, two layers of the resampler, two gated blocks"
    sums = dict(reversed(line.split("  ")) for line in (vision / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"config.json", "model.safetensors", "encoder/config.json", "encoder/model.safetensors",
                         "encoder/preprocessor_config.json"}  # fmt: skip
    for name, sha in sums.items():
        assert hashlib.sha256((vision / name).read_bytes()).hexdigest() == sha
    assert sorted(path.name for path in exported.parent.iterdir() if path.name.startswith("exported")) == ["exported"]


def test_verify_compares_every_part(seen: Path, exported: Path, tmp_path: Path) -> None:
    found = verify(seen, exported)
    assert not any(found[key] for key in DIFFERENCES) and found["notes"] == []
    text = len(open_weights(exported).shapes)
    assert found["compared"] > text + 40, "text, vision parts and encoder"
    small = tmp_path / "small"
    to_huggingface(seen, small, max_shard_bytes=20_000)
    assert len(list((small / "vision").glob("*.safetensors"))) > 1
    found = verify(seen, small)
    assert not any(found[key] for key in DIFFERENCES) and found["rounded_to_bf16"]
    assert [row["setting"] for row in verify(exported, changed(exported, tmp_path / "head_dim"))["settings"]] == [
        "vision.resampler.num_attention_heads"
    ]
    shutil.rmtree(small / "vision")
    lost, turned = verify(seen, small), verify(small, exported)
    assert len(lost["only_in_a"]) == len(turned["only_in_b"]) > 40 and lost["only_in_b"] == []
    assert lost["only_in_a"] == turned["only_in_b"] and "vision: resampler.latents" in lost["only_in_a"]
    assert status(lost) == 1
    text = verify(seen, small, text_only=True)
    assert status(text) == 0 and "--text-only" in text["notes"][0]


def changed(exported: Path, out: Path) -> Path:
    """A copy whose resampler has other heads, with sums that fit."""
    return with_config(exported, out, lambda config: config["resampler"].update(num_attention_heads=2))


@pytest.mark.parametrize("name", ["model.safetensors", "encoder/model.safetensors", "config.json"])
def test_a_changed_byte_is_found(name: str, seen: Path, exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    path = copy / "vision" / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=f"vision/{name} is not what was written"):
        verify(seen, copy)


def test_a_killed_export_goes_on_and_ends_alike(seen: Path, exported: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with patch.object(Draft, "checksums", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        to_huggingface(seen, out, dtype="fp32", tokenizer=tokenizer)
    assert not out.exists() and (tmp_path / "out.partial" / "vision").is_dir()
    to_huggingface(seen, out, dtype="fp32", tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == contents(exported)


def test_a_missing_file_and_an_added_one_are_found(seen: Path, exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "vision" / "encoder" / "more.safetensors").write_bytes(b"x")
    with pytest.raises(ConversionError, match=r"more\.safetensors is not in SHA256SUMS"):
        verify(seen, copy)
    (copy / "vision" / "encoder" / "more.safetensors").unlink()
    (copy / "vision" / "encoder" / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"encoder/model\.safetensors is missing"):
        verify(seen, copy)


def test_an_inference_folder_has_the_text_part_alone(seen: Path, tmp_path: Path) -> None:
    to_inference_layout(seen, tmp_path / "served", tp=1, pp=1)
    found = verify(seen, tmp_path / "served")
    assert not any(found[key] for key in DIFFERENCES)
    assert "An inference folder is a text model" in found["notes"][0]


def test_a_mixture_with_a_fresh_encoder_comes_back_from_its_export(
    seen: Path, exported: Path, cases: list[Case], tmp_path: Path
) -> None:
    answer = from_huggingface(exported, tmp_path / "back")
    assert answer["notes"] == [f"{tmp_path / 'back' / 'encoder'} has the image encoder: it stays there while the model "
                               "is used."]  # fmt: skip
    found = verify(seen, tmp_path / "back")
    assert not any(found[key] for key in DIFFERENCES) and found["compared"] == verify(seen, exported)["compared"]
    for own, back in zip(our_logits(seen, IMAGE_ID, cases[:3]), our_logits(tmp_path / "back", IMAGE_ID, cases[:3]),
                         strict=True):  # fmt: skip
        assert np.array_equal(own, back)


def test_what_does_not_belong_to_the_model_is_refused(
    seen: Path, tokenizer: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConversionError, match="the tokenizer has no such special token"):
        to_huggingface(seen, out, tokenizer=tokenizer, image_token="<picture>")
    with pytest.raises(ConversionError, match="a fresh one"):
        to_huggingface(seen, out, encoder=tmp_path)
    with pytest.raises(ConversionError, match="is a text model: it has no encoder"):
        to_huggingface(trained, out, encoder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    planned = to_huggingface(seen, out, dry_run=True)
    assert list(tmp_path.iterdir()) == [] and "--image-token" in planned["notes"][-1]
    assert {file["name"] for file in planned["files"]} == {
        "model.safetensors",
        "vision/model.safetensors",
        "vision/encoder/model.safetensors",
    }
