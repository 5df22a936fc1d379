"""Chats with images: OpenAI's parts become tokens and pixels, everything else is refused by name; the ranks of a server
say what tools/generate.py says of the same files."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.inference import pictures
from gpt4moe.inference.load import open_checkpoint, placed
from gpt4moe.inference.requests import Completion, Limits
from gpt4moe.inference.sight import Sight, sight_of
from gpt4moe.parallel.environment import Environment
from gpt4moe.serving.bad_request import BadRequest
from gpt4moe.serving.desk import Desk, Event, Job, Wanted
from gpt4moe.serving.engine import Engine
from gpt4moe.serving.fields import Question, read_body
from tests.inference.seeing import make_place, png
from tests.inference.test_image_command import told
from tests.serving.test_fields import SIGHT
from tests.spawn import run_ranks

FILE = png(0)
URL = "data:image/png;base64," + base64.b64encode(FILE).decode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def sight(place: Path) -> Sight:
    opened = open_checkpoint(place / "seeing")
    return sight_of(opened.run, opened.words(), None)


def image(url: str = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def chat(sight: Sight, *parts: Any, **fields: Any) -> Question:
    messages = [{"role": "user", "content": list(parts)}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 8, **fields}
    return read_body(body, sight, is_chat=True, model="m")


def test_parts_become_image_tokens_at_their_places_and_pixels(sight: Sight) -> None:
    (wanted,) = chat(sight, image(detail="auto"), {"type": "text", "text": "or"}, image()).wanted
    places = [place for place, token in enumerate(wanted.prompt) if token == sight.image_id]
    assert [one.place for one in wanted.images] == places and len(places) == 2
    assert [one.read().shape for one in wanted.images] == [(1, 16, 16, 3)] * 2


def test_an_image_is_hashed_once_for_all_texts_that_have_it(sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(pictures, "digest_of", lambda pixels: hashed.append(pixels) or "digest")
    several = chat(sight, image(), n=5).wanted
    engine: Any = SimpleNamespace(words=sight.words, sight=sight, left=set())
    for number, wanted in enumerate(several):
        (found,) = Engine._request(engine, wanted, number).images
        assert found.digest == "digest"
    assert len(several) == 5 and len(hashed) == 1


def flat(width: int, height: int) -> dict[str, Any]:
    """A part with a picture of few bytes and many pixels."""
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return image("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())


def test_pixels_of_an_image_and_of_a_request_are_bounded_before_any_is_decoded(
    sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("gpt4moe.inference.sight.decode", decode)
    with pytest.raises(BadRequest, match=r"Image 1 .* 5,000 x 4,001 pixels, more than 20,000,000"):
        chat(sight, flat(5000, 4001))
    with pytest.raises(BadRequest, match=r"The 3 images have 45,000,000 pixels, more than 40,000,000 together"):
        chat(sight, *[flat(5000, 3000)] * 3)
    with pytest.raises(AssertionError, match="decoded"):
        chat(sight, *[flat(5000, 4000)] * 2)


def test_what_is_no_image_is_refused_by_its_field(sight: Sight) -> None:
    text = {"type": "text", "text": "a"}
    large = "data:image/png;base64," + base64.b64encode(png(0, (1, 65_536))).decode()
    cases: list[tuple[Any, str]] = [
        (image("http://example.com/a.png"), "nothing is fetched"), (image("file:///etc/passwd"), "nothing is fetched"),
        (image("data:image/png,abc"), "base64"), (image("data:image/png;base64,?"), "base64 is damaged"),
        (image("data:image/png;base64," + base64.b64encode(FILE[:80]).decode()), "it is not whole"),
        (image(large), "more than 65,535"), (image(detail="high"), "image_url.detail"),
        ({"type": "image_url", "image_url": URL}, "parts of type text or image_url"),
        ({"type": "input_audio"}, "parts of type text or image_url"), ("a", "parts of type text or image_url"),
        ({"type": "text", "text": "<image>"}, "has <image> in its text"),
    ]  # fmt: skip
    for part, words in cases:
        with pytest.raises(BadRequest) as refused:
            chat(sight, text, part)
        assert words in refused.value.message, part
    with pytest.raises(BadRequest, match="more than 32"):
        chat(sight, *[image()] * 33)
    with pytest.raises(BadRequest, match="the folder has a text model"):
        chat(SIGHT, image())
    with pytest.raises(BadRequest, match="has an image token"):
        read_body({"model": "m", "prompt": [5, sight.image_id]}, sight, is_chat=False, model="m")


def _served(environment: Environment, folder: Path, wanted: list[Wanted]) -> list[Completion]:
    """What the ranks of a server make of texts that arrive together."""
    opened = open_checkpoint(folder)
    sight = sight_of(opened.run, opened.words(), None)
    parallel = ParallelConfig(tp=environment.world_size)
    desk = Desk(8) if environment.rank == 0 else None
    found: list[Completion] = []
    with placed(opened, parallel=parallel, environment=environment) as model:

        def put(event: Event) -> None:
            if event.done is not None:
                found.append(event.done)
                if len(found) == len(wanted) and desk is not None:
                    desk.close("The end.")

        engine = Engine(model, sight, Limits(), desk)
        if desk is not None:
            engine.check(wanted)
            job = Job(wanted, put)
            desk.waiting += [(job, index) for index in range(len(wanted))]
        engine.run()
    return sorted(found, key=lambda one: one.number)


def test_the_ranks_of_a_server_say_what_generate_says(place: Path, sight: Sight) -> None:
    wanted = chat(sight, {"type": "text", "text": "what is "}, image(), {"type": "text", "text": "?"}).wanted
    blind = chat(sight, {"type": "text", "text": "what is "}).wanted
    found, _ = run_ranks(2, _served, place / "seeing", [*blind, *wanted])
    (one,) = told(place / "seeing", "--chat", "--image", place / "0.png", "--prompt", "what is <image>?")
    assert found[1].tokens == one["tokens"]
    assert found[1].logprobs == pytest.approx(one["logprobs"], abs=1e-4)
