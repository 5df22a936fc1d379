"""Prompts with images before a model is there: names that are no files, an image token that the model lacks, an
encoder whose files have changed."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from gpt4moe.config.run import RunConfig
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.evaluation.in_loop import Samples
from gpt4moe.evaluation.questions import Examiner, greedy_request, read_exact
from gpt4moe.inference import generation
from gpt4moe.inference.command import weights_of
from gpt4moe.inference.files import read_prompts
from gpt4moe.inference.requests import Completion, Request
from gpt4moe.inference.sight import clip_of, sight_of
from gpt4moe.inference.text import Words
from tests.architecture.test_encoder_folder import config, saved
from tests.inference.cases import run_of

LONG = "x" * 5000 + ".png"


def words_of(vocab_size: int) -> Words:
    """With <image> among its 258 tokens."""
    backend = train_tokenizer(["a"], vocab_size=258, special=["<image>"]).backend
    return Words(backend=backend, end_ids=frozenset({0}), vocab_size=vocab_size, context_length=64)


@pytest.mark.parametrize(
    "images", [[LONG], [[LONG]], [f"{LONG},b.png"], ["data:image/png;base64,AAAA"], ["https://example.com/a.png"]]
)
def test_a_name_that_is_no_file_is_refused_with_a_cause(images: Any, tmp_path: Path) -> None:
    path, sight = tmp_path / "in.jsonl", sight_of(run_of("vision"), words_of(300), None)
    path.write_text(json.dumps({"prompt": "<image>", "images": images}) + "\n")
    with pytest.raises(DataError, match=r"is a URL|cannot be read: File name too long") as refused:
        (prompt,) = read_prompts(path)
        assert sight.image_id is not None
        sight.pictures([sight.image_id], prompt.images)
    assert len(refused.value.cause) < 700


def test_a_folder_that_may_not_be_read_is_refused_with_a_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:  # as for anybody but root, who may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        clip_of(str(tmp_path))


def test_images_among_the_parts_of_a_chat_are_refused_in_files(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}], "answer": "b"}) + "\n")
    with pytest.raises(DataError, match="line 1 has a part of type image_url in its messages"):
        read_prompts(path)
    with pytest.raises(DataError, match="has images, and questions are read as text alone"):
        read_exact(path, words_of(300), 4)
    path.write_text(json.dumps({"prompt": "<image>", "image": "a.png"}) + "\n")
    with pytest.raises(DataError, match='line 1 has the key "image"'):
        read_prompts(path)
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts[:1]}]}) + "\n")
    assert len(read_prompts(path)) == 1


def test_an_image_token_that_the_model_lacks_stands_for_no_image() -> None:
    run, number = run_of("vision"), words_of(300).backend.token_to_id("<image>")
    assert sight_of(run, words_of(number + 1), None).banned == {number}
    sight = sight_of(run, words_of(number), None)
    assert not sight.reads_images  # else a token beyond the logits would be banned
    with pytest.raises(ConfigError, match=rf"no special token <image>, within model.vocab_size={number}"):
        sight.require("A prompt")


class Asked:
    """Stands where Generator does, and keeps what it is asked."""

    requests: ClassVar[list[Request]] = []

    def __init__(self, *model: object, **more: object):
        pass

    def generate_all(self, requests: list[Request]) -> list[Completion]:
        Asked.requests = requests
        return [
            Completion(number=at, tokens=[1], logprobs=[0.0], finish_reason="length") for at in range(len(requests))
        ]


def test_evaluations_of_a_vision_model_draw_no_image_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "Generator", Asked)
    run, words = run_of("vision"), words_of(300)
    banned = {words.backend.token_to_id("<image>")}
    run = replace(run, training=replace(run.training, sample_every=1, sample_prompts=["a"]))
    Samples(run, words).ask([], None, 1)  # type: ignore[arg-type]
    assert [one.banned for one in Asked.requests] == [banned]
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    scorer: Any = SimpleNamespace(chunks=[], groups=None, score=lambda pieces: [], images=SimpleNamespace(maker=None))
    Examiner(scorer, run, words).answer(read_exact(tmp_path / "in.jsonl", words, 4))
    assert [one.banned for one in Asked.requests] == [banned]
    assert greedy_request(words, [1], 2, []).banned == frozenset()


def test_answers_of_another_encoder_are_not_mixed(tmp_path: Path) -> None:
    def settings(run: RunConfig, **options: bool) -> dict[str, Any]:
        opened: Any = SimpleNamespace(run=run, step=1, fingerprint=lambda: "f")
        return weights_of(opened, **options)

    run = run_of("vision")
    assert run.model.vision is not None
    assert settings(run, has_images=True) == {"step": 1, "weights": "f"}  # a fresh encoder follows from the run
    vision = replace(run.model.vision, encoder=config(saved(tmp_path)))
    run = replace(run, model=replace(run.model, vision=vision))
    assert settings(run) == {"step": 1, "weights": "f"}
    found = [settings(run, has_images=True)]
    for name, content in (("preprocessor_config.json", '{"image_mean": [0, 0, 0]}'), ("model.safetensors", None)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1] + b"\1" if content is None else content.encode())
        found.append(settings(run, has_images=True))
    assert len({one["encoder"] for one in found}) == 3
