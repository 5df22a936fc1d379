"""tools/generate.py with images: the same text on layouts, from --prompt and from jsonl, as a chat; bad input."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from gpt4moe.architecture.encoder_folder import encoder_identity
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.errors import ConfigError
from gpt4moe.inference.load import loaded_model, open_checkpoint
from gpt4moe.model.vision_encoder import FrozenEncoder
from gpt4moe.parallel.environment import Environment
from tests.inference.seeing import TEMPLATE, make_place, png
from tests.inference.tool import TOOL, generate
from tests.media.test_image_rows import documents, folder_of
from tests.spawn import run_ranks
from tests.training.command import Ended

GREEDY = ("--temperature", 0, "--tokens", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def told(*arguments: object, ranks: int = 1) -> list[dict[str, Any]]:
    ended = generate(*arguments, *GREEDY, "--json", ranks=ranks)
    assert [one.status for one in ended] == [0] * ranks, ended[0].err
    found: list[dict[str, Any]] = json.loads(ended[0].out)
    return found


@pytest.fixture(scope="module")
def wanted(place: Path) -> list[dict[str, Any]]:
    return told(place / "seeing", "--input", place / "prompts.jsonl")


def test_images_of_prompts_of_rows_and_of_every_layout_give_one_text(place: Path, wanted: list[dict[str, Any]]) -> None:
    images = ("--image", place / "0.png", "--image", place / "1.png", "--image", place / "clip")
    prompts = ("--prompt", "<image>word 1", "word <image> and <image>", "word 1")
    by_comma = (*images[:-1], f"{place}/clip/2.png,{place}/clip/10.png")
    for found in (
        told(place / "seeing", *images, *prompts),
        told(place / "seeing", *by_comma, *prompts, "--tp", 2, "--pp", 2, "--ep", 2, ranks=4),
    ):
        assert [one["tokens"] for one in found] == [one["tokens"] for one in wanted]
        for one, same in zip(found, wanted, strict=True):
            assert one["logprobs"] == pytest.approx(same["logprobs"], abs=1e-4)


def test_another_image_gives_another_answer(place: Path, wanted: list[dict[str, Any]]) -> None:
    (found,) = told(place / "seeing", "--image", place / "2.png", "--prompt", "<image>word 1")
    assert max(abs(a - b) for a, b in zip(found["logprobs"], wanted[0]["logprobs"], strict=True)) > 1e-3


def test_a_chat_shows_its_images_where_the_template_shows_its_contents(place: Path, tmp_path: Path) -> None:
    seeing, asked = place / "seeing", ("--image", place / "0.png", "--prompt")
    (chat,) = told(seeing, "--chat", *asked, "what is <image>?")
    (plain,) = told(seeing, *asked, "user: what is <image>?\nassistant:")
    assert chat["tokens"] == plain["tokens"]
    row = {"messages": [{"role": "user", "content": "what is <image>?"}], "images": [str(place / "0.png")]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert told(seeing, "--input", tmp_path / "in.jsonl")[0]["tokens"] == chat["tokens"]
    file = place / "tokenizer" / "chat_template.jinja"
    file.write_text("{% for message in messages %}{{ message.role }}{% endfor %}")
    (ended,) = generate(seeing, "--chat", *asked, "<image>")
    file.write_text(TEMPLATE)
    assert ended.status == 2 and "Prompt 0 has 1 image, but its rendered chat has 0 <image> tags." in ended.err


CHOICES = [
    {"id": "one", "prompt": "<image>word", "choices": [" 1", " 2 and", "other"], "answer": 0, "images": ["0.png"]},
    {"id": "two", "prompt": "word <image> and <image> ", "choices": ["12", "thing", " 3"], "answer": " 3",
     "images": ["1.png", ["clip/2.png", "clip/10.png"]]},
    {"id": "text", "prompt": "word 1", "choices": [" and", "other"], "answer": 1},
    {"id": "other", "prompt": "<image>word", "choices": [" 1", " 2 and", "other"], "answer": 0, "images": ["2.png"]},
]  # fmt: skip
EXACT = [
    {"id": "a", "prompt": "<image>word 1", "answer": "?", "images": ["0.png"]},
    {"id": "b", "prompt": "word <image> and <image>", "answer": "?",
     "images": ["1.png", ["clip/2.png", "clip/10.png"]]},
    {"id": "c", "messages": [{"role": "user", "content": "what is <image>?"}], "answer": "?", "images": ["0.png"]},
    {"id": "d", "prompt": "word 1", "answer": "?"},
]  # fmt: skip


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _evaluation(place: Path, out: Path, *layout: object, ranks: int = 1) -> list[Ended]:
    asked = ("--choices", place / "choices.jsonl", "--exact", place / "exact.jsonl", "--tokens", 8)
    data = ("--data", place / "web" / "data", "--max-tokens", 150, "--output", out, "--json")
    return generate(place / "seeing", *asked, *data, *layout, ranks=ranks, tool=TOOL.with_name("evaluate.py"))


def _evaluated(place: Path, out: Path, *layout: object, ranks: int = 1) -> list[dict[str, Any]]:
    """Lines of answers; the last has the losses of sources."""
    ended = _evaluation(place, out, *layout, ranks=ranks)
    assert [one.status for one in ended] == [0] * ranks, ended[0].err
    return [*map(json.loads, out.read_text().splitlines()), json.loads(ended[0].out)]


def test_questions_and_losses_with_images_are_the_same_on_every_layout(
    place: Path, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    _lines(place / "choices.jsonl", CHOICES)
    _lines(place / "exact.jsonl", EXACT)
    folder_of(place / "web", place / "tokenizer.json", documents(20))
    alone = _evaluated(place, tmp_path / "alone.jsonl")
    for name, ranks, layout in (("grid", 4, ("--tp", 2, "--pp", 2, "--ep", 2)), ("copies", 2, ("--etp", 2))):
        found = _evaluated(place, tmp_path / f"{name}.jsonl", *layout, ranks=ranks)
        for one, same in zip(found[:8], alone[:8], strict=True):
            assert one.get("text") == same.get("text")
            assert one.get("loglikelihoods") == pytest.approx(same.get("loglikelihoods"), abs=1e-4)
        assert found[-1]["sources"][0]["tokens"] == alone[-1]["sources"][0]["tokens"] >= 150
        assert found[-1]["sources"][0]["loss"] == pytest.approx(alone[-1]["sources"][0]["loss"], abs=1e-5)
    one, _, _, other, *texts = alone[:8]
    assert max(abs(a - b) for a, b in zip(one["loglikelihoods"], other["loglikelihoods"], strict=True)) > 1e-3
    # What tools/generate.py says to the same prompts.
    assert [texts[at]["text"] for at in (0, 1, 3)] == [answer["text"].strip() for answer in wanted]
    # Answers to another image are not mixed with these.
    before = (place / "2.png").read_bytes()
    (place / "2.png").write_bytes(png(77))
    (ended,) = _evaluation(place, tmp_path / "alone.jsonl")
    (place / "2.png").write_bytes(before)
    assert ended.status == 2 and "was begun with images=" in ended.err


def test_bad_questions_with_images_end_with_2_before_a_model_is_loaded(place: Path, tmp_path: Path) -> None:
    good, choices = str(place / "0.png"), {"choices": ["a", "b"], "answer": 0}
    rows: dict[str, tuple[str, str, dict[str, Any]]] = {
        "line 1 has 0 images, but it has 1 <image> tag.": ("seeing", "choices", {"prompt": "<image>", **choices}),
        "line 1 has 1 image, but it has 0 <image> tags.": ("seeing", "exact", {"prompt": "a", "answer": "b",
                                                                              "images": [good]}),
        "line 1 has images, but the folder has a text model.": ("blind", "exact", {"prompt": "<image>", "answer": "b",
                                                                                  "images": [good]}),
        "gone.png is missing": ("seeing", "choices", {"prompt": "<image>", "images": ["gone.png"], **choices}),
        "line 1 has the image 7": ("seeing", "choices", {"prompt": "<image>", "images": [7], **choices}),
    }  # fmt: skip
    for number, (words, (folder, kind, row)) in enumerate(rows.items()):
        path = _lines(tmp_path / f"{number}.jsonl", [row])
        (ended,) = generate(place / folder, f"--{kind}", path, tool=TOOL.with_name("evaluate.py"))
        lines = ended.err.strip().splitlines()
        assert ended.status == 2 and words in lines[0] and len(lines) == 2, (words, ended.err)


def test_answers_of_other_images_are_not_mixed(place: Path, tmp_path: Path) -> None:
    row = {"id": 1, "prompt": "<image>", "images": ["a.png"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.png").write_bytes(png(1))
    arguments = (place / "seeing", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *GREEDY)
    (ended,) = generate(*arguments)
    assert ended.status == 0, ended.err
    (tmp_path / "a.png").write_bytes(png(2))
    (ended,) = generate(*arguments)
    assert ended.status == 2 and "was begun with prompts=" in ended.err


@pytest.fixture(scope="module")
def of_folder(place: Path) -> Path:
    """The run `seeing` as one of an encoder's folder, `siglip`: the same weights, which its manifest knows."""
    run_ranks(1, _save_encoder, place / "seeing", place / "siglip")
    return _with_manifest(place / "seeing", place / "of_folder", {"encoder": encoder_identity(place / "siglip")})


def _save_encoder(environment: Environment, folder: Path, out: Path) -> None:
    run = open_checkpoint(folder).run
    assert run.model.vision is not None
    FrozenEncoder(run.model.vision.encoder, run.run.seed, torch.device("cpu"), torch.float32).model.save_pretrained(out)


def _with_manifest(run: Path, out: Path, identity: dict[str, Any]) -> Path:
    shutil.copytree(run, out)
    step = find_checkpoint(out)
    manifest = Manifest.load(step)
    vision = manifest.config["model"]["vision"]
    vision["encoder"] |= {"kind": "folder", "folder": str(run.parent / "siglip")}
    known = {key: value for key, value in manifest.identity.items() if key != "encoder"}
    dataclasses.replace(manifest, identity=known | identity).save(step)
    return out


def test_another_encoder_than_the_model_was_trained_with_is_refused(
    place: Path, of_folder: Path, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = ("--image", place / "0.png", "--prompt", "<image>word 1")
    moved = shutil.copytree(place / "siglip", tmp_path / "moved")
    (same,) = told(of_folder, *asked, "--encoder", moved)
    assert same["tokens"] == wanted[0]["tokens"]
    tensors = load_file(moved / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, moved / "model.safetensors", {"format": "pt"})
    (ended,) = generate(of_folder, *asked, "--encoder", moved)
    cause, cure = ended.err.strip().splitlines()
    assert ended.status == 2 and "another encoder than the model was trained with: weights sha256" in cause
    assert "--encoder" in cure
    old = _with_manifest(of_folder, tmp_path / "old", {})
    swapped = _with_manifest(of_folder, tmp_path / "swapped", {"encoder": encoder_identity(moved)})
    assert run_ranks(1, _makes_latents, [of_folder, old, swapped]) == [["", "", "another encoder"]]
    ended_old = generate(old, *asked, *GREEDY)[0]
    assert ended_old.status == 0 and "does not say which encoder" in ended_old.err


def _makes_latents(environment: Environment, folders: list[Path]) -> list[str]:
    """What a program is told that takes images, of each folder."""
    said = []
    for folder in folders:
        with loaded_model(folder, environment=environment) as model:
            try:
                model.latent_maker()
                said.append("")
            except ConfigError as error:
                said.append("another encoder" if "has another encoder than" in error.cause else error.cause)
    return said


def test_bad_images_end_with_2_and_one_cause_before_a_model_is_loaded(place: Path, tmp_path: Path) -> None:
    seeing, blind, good = place / "seeing", place / "blind", place / "0.png"
    (tmp_path / "torn.png").write_bytes(png(1)[:200])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "<image>", "images": [7]}\n')
    frames = ",".join([str(good)] * 4)
    cases: dict[str, tuple[Any, ...]] = {
        "Prompt 0 has 0 images, but it has 1 <image> tag.": (seeing, "--prompt", "<image>"),
        "Prompt 0 has 2 images, but it has 1 <image> tag.": (seeing, "--prompt", "<image>", "--image", good, good),
        "Prompt 0 has 1 image, but it has 0 <image> tags.": (seeing, "--image", good),
        "1 --image for 2 <image> in 2 prompts.": (seeing, "--prompt", "<image>", "a <image>", "--image", good),
        "--image has images, but the folder has a text model.": (blind, "--prompt", "<image>", "--image", good),
        "torn.png cannot be read as an image: it is not whole": _asks(seeing, tmp_path / "torn.png"),
        "text.png cannot be read as an image: it is no image of": _asks(seeing, tmp_path / "text.png"),
        "large.png cannot be read as an image: it has 9,000 x 9,000": _asks(seeing, tmp_path / "large.png"),
        "gone.png is missing": _asks(seeing, tmp_path / "gone.png"),
        "empty has no images": _asks(seeing, tmp_path / "empty"),
        "has 4 frames, but model.vision.resampler.max_frames is 3": _asks(seeing, frames),
        "the model's encoder is no folder": (*_asks(seeing, good), "--encoder", tmp_path),
        "the folder has a text model.": (blind, "--prompt", "a", "--encoder", tmp_path),
        "--image-token <nothing>": (*_asks(seeing, good), "--image-token", "<nothing>"),
        "line 1 has the image 7": (seeing, "--input", tmp_path / "rows.jsonl"),
        "--image gives images of --prompt": (seeing, "--input", tmp_path / "rows.jsonl", "--image", good),
        "Prompt 0 has 0 images, but its rendered chat has 1 <image> tag.": (seeing, "--chat", "--prompt", "<image>"),
    }  # fmt: skip
    for words, arguments in cases.items():
        (ended,) = generate(*arguments)
        lines = ended.err.strip().splitlines()
        assert ended.status == 2 and words in lines[0] and len(lines) == 2, (words, ended.err)


def _asks(folder: Path, image: object) -> tuple[Any, ...]:
    return folder, "--prompt", "<image>word", "--image", image
