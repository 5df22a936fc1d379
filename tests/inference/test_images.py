"""Prompts with images: greedy tokens and logits of every layout are those of the trainer's forward pass in one process;
no image moves another prompt; with gates at 0 a vision model says what its text model says."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.architecture.cache import rank_image_bytes
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import stack
from gpt4moe.data.samples import TokenSample
from gpt4moe.errors import ConfigError
from gpt4moe.inference.cache import blocks_of
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.image_cache import LatentMaker
from gpt4moe.inference.pictures import Pixels, picture
from gpt4moe.inference.requests import Completion, Limits, Request
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import decoder_layers
from gpt4moe.model.transformer_config import TORCH_DTYPES
from gpt4moe.model.vision_encoder import FrozenEncoder
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.images import ImageLatents
from tests.inference.cases import NEW_TOKENS, greedy, prompts, run_of, walk, write
from tests.spawn import run_ranks

CLOSE = 1e-4
IMAGE = 127  # the token that stands for an image
PLACES = ((), (0,), (0,), (2, 10, 30), (15,))  # of the images of cases.prompts, of 5, 17, 1, 33 and 16 tokens
FRAMES = {(3, 1): 2}  # clips: prompt, its image -> frames
EVERY_IMAGE = tuple((prompt, image) for prompt, places in enumerate(PLACES) for image in range(len(places)))
NAMES = ("tp2", "pp2", "pp2-vpp2", "ep4", "etp2", "tp2-ep2-etp2", "tp2-pp2-ep2", "tp2-pp2-vpp2-etp2", "cp2-pp2-ep2")


def pixels(number: int, frames: int = 1) -> Pixels:
    noise = np.random.default_rng(number).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    return noise // 2 + np.uint8(number * 37 % 128)  # images that differ in their brightness too


def requests(new_tokens: int = NEW_TOKENS, changed: Sequence[tuple[int, int]] = ()) -> list[Request]:
    """Args: changed: (prompt, image) that are another picture."""
    found = []
    for number, (request, places) in enumerate(zip(greedy(prompts(), new_tokens), PLACES, strict=True)):
        tokens = [IMAGE if place in places else token % IMAGE for place, token in enumerate(request.prompt)]
        images = [
            picture(pixels(10 * number + at + 500 * ((number, at) in changed), FRAMES.get((number, at), 1)), place)
            for at, place in enumerate(places)
        ]
        found.append(replace(request, prompt=tokens, images=images, banned=frozenset({IMAGE})))
    return found


def opened(chunks: list[Any], run: RunConfig, groups: ProcessGroups, gate: float = 0.6) -> LatentMaker:
    """The maker; takes the resampler's chunk off, and sets every gate."""
    *_, resampler = chunks
    for chunk in chunks[:-1]:
        for layer in decoder_layers(chunk).values():
            if layer.gated_cross_attention is not None:
                layer.gated_cross_attention.attention_gate.data.fill_(2 * gate)
                layer.gated_cross_attention.mlp_gate.data.fill_(gate)
    chunks.pop()
    assert run.model.vision is not None
    dtype = TORCH_DTYPES[run.precision.dtype]
    return LatentMaker(FrozenEncoder(run.model.vision.encoder, run.run.seed, groups.device, dtype), resampler)


def told(texts: Sequence[Completion]) -> list[tuple[list[int], list[float]]]:
    return [(text.tokens, text.logprobs) for text in texts]


def _of_layout(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> tuple[Any, ...]:
    """Texts; logits that this rank drew from; its copy, the copies; images that it made; whether it attends to any."""
    maker = opened(chunks, run, groups)
    found = write(chunks, run, groups, requests(), maker=maker)
    logits = {key: values.numpy() for key, values in found.logits.items()}
    sees = any(layer.gated_cross_attention for chunk in chunks for layer in decoder_layers(chunk).values())
    return told(found.texts), logits, groups.dp_cp.rank(), groups.dp_cp.size(), maker.num_made, sees


@cache
def four_ranks() -> dict[str, list[Any]]:
    answers = run_ranks(4, walk, [("vision", name) for name in NAMES], _of_layout, timeout_seconds=600)
    return {name: [answer[at] for answer in answers] for at, name in enumerate(NAMES)}


@torch.no_grad()
def _trained(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> list[tuple[list[int], np.ndarray]]:
    """Greedy tokens and logits by the trainer's forward pass, again for each token; first ones of other images."""
    every = list(chunks)
    opened(chunks, run, groups)
    latents = ImageLatents(run, SimpleNamespace(chunks=every), groups)  # type: ignore[arg-type]  # it asks for no more
    (chunk,), found = chunks, []
    chunk.eval()
    for request in [*requests(), *requests(new_tokens=1, changed=EVERY_IMAGE)]:
        tokens, logits = list(request.prompt), []
        for _ in range(request.max_tokens):
            media = np.zeros(len(tokens), dtype=np.int32)
            for number, image in enumerate(request.images, start=1):
                media[image.place :] = number
            images = tuple(image.read() for image in request.images)
            sample = TokenSample(
                np.array([*tokens, 0]), np.ones(len(tokens), dtype=np.float32), media=media, images=images,
                image_frames=tuple(map(len, images)),
            )  # fmt: skip
            batch = stack([sample], [0])
            (seen,) = latents.make([batch], [batch], with_gradient=False)
            seen["context_mask"] = torch.zeros_like(batch.tokens) if batch.media is None else batch.media
            out = chunk(batch.tokens, batch.position_ids, None, extra_block_kwargs=seen)[0, -1].float()
            logits.append(out)
            tokens.append(int(out.masked_fill(torch.arange(len(out)) == IMAGE, -torch.inf).argmax()))
        found.append((tokens[len(request.prompt) :], torch.stack(logits).numpy()))
    return found


@cache
def trained() -> list[tuple[list[int], np.ndarray]]:
    ((found,),) = run_ranks(1, walk, [("vision", "one")], _trained)
    result: list[tuple[list[int], np.ndarray]] = found
    return result


@pytest.mark.timeout(700)  # the first case starts the ranks and walks through all of them
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logits_of_a_layout_are_those_of_the_trainer_in_one_process(name: str) -> None:
    seen = 0
    for texts, logits, copy, num_copies, num_made, sees in four_ranks()[name]:
        assert [tokens for tokens, _ in texts] == [tokens for tokens, _ in trained()[: len(PLACES)]]
        for (number, position), values in logits.items():
            request = copy + num_copies * number
            at = position - len(prompts()[request])
            wanted = trained()[request][1][at]
            np.testing.assert_allclose(values, wanted, atol=CLOSE)
            logprob = torch.log_softmax(torch.from_numpy(wanted), -1)[texts[request][0][at]]
            assert abs(texts[request][1][at] - logprob) < CLOSE
            seen += 1
        of_copy = sum(len(PLACES[at]) for at in range(copy, len(PLACES), num_copies))
        assert num_made == of_copy * sees  # each image once, on each rank that has a gated block
    assert seen == NEW_TOKENS * len(PLACES)


def test_the_texts_vary_and_the_images_matter() -> None:
    assert len({token for tokens, _ in trained() for token in tokens}) > 10
    for places, (_, before), (_, after) in zip(PLACES, trained(), trained()[len(PLACES) :], strict=False):
        moved = np.abs(before[0] - after[0]).max()
        assert moved > 100 * CLOSE if places else moved == 0


def _alone(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    maker = opened(chunks, run, groups)

    def of(limits: Limits | None = None) -> list[Any]:
        return told(write(chunks, run, groups, requests(), limits, maker).texts)

    found: dict[str, Any] = {
        "all": of(), "rows": of(Limits(max_rows=2)), "pieces": of(Limits(max_rows=3, max_step_tokens=7)),
        "alone": [told(write(chunks, run, groups, [one], maker=maker).texts)[0] for one in requests()],
    }  # fmt: skip
    found["arrived"] = _arrived(chunks, run, groups, maker)
    found["made at arrival"] = _made_at_arrival(chunks, run, groups, maker)
    samples = [replace(one, sample=sample) for sample in range(3) for one in requests()]
    maker.num_made = 0
    write(chunks, run, groups, samples, Limits(max_rows=2), maker)
    found["made one by one"] = maker.num_made
    maker.num_made = 0
    found["samples"] = told(write(chunks, run, groups, samples, maker=maker).texts)
    found["made together"] = maker.num_made
    first = found["all"][3][0][0]
    banned = replace(requests()[3], banned=frozenset({first, IMAGE}))
    found["banned"] = told(write(chunks, run, groups, [banned], maker=maker).texts)[0], first
    return found


def _arrived(chunks: list[Any], run: RunConfig, groups: ProcessGroups, maker: LatentMaker) -> list[Any]:
    arrive, calls = {0: requests()[3:4], 3: requests()[:3], 5: requests()[4:]}, []

    def arrivals(is_idle: bool) -> list[Request] | None:
        calls.append(is_idle)
        return arrive.get(len(calls) - 1, []) if len(calls) < 40 else None

    done = {one.number: one for one in Generator(chunks, run, groups, maker=maker).generate([], arrivals)}
    return told([done[number] for number in (1, 2, 3, 0, 4)])


def _made_at_arrival(
    chunks: list[Any], run: RunConfig, groups: ProcessGroups, maker: LatentMaker
) -> tuple[list[int], Completion]:
    """Images made in each step, of texts that arrive together; what becomes of one whose client has gone already."""
    gone = replace(requests(changed=EVERY_IMAGE)[3], is_stopped=lambda new: True)
    arrive, seen = [requests()[1], requests()[2], gone, *requests()[3:]], list[int]()
    maker.num_made = 0

    def arrivals(is_idle: bool) -> list[Request] | None:
        seen.append(maker.num_made)
        return (arrive if len(seen) == 1 else []) if len(seen) < 20 else None

    done = {one.number: one for one in Generator(chunks, run, groups, maker=maker).generate([], arrivals)}
    return [after - before for before, after in pairwise(seen)], done[2]


@cache
def one_process() -> dict[str, Any]:
    ((found,),) = run_ranks(1, walk, [("vision", "one")], _alone)
    result: dict[str, Any] = found
    return result


@pytest.mark.parametrize("how", ["rows", "pieces", "alone", "arrived"])
def test_a_text_is_the_same_alone_among_others_in_pieces_and_when_it_joins_later(how: str) -> None:
    assert [tokens for tokens, _ in one_process()[how]] == [tokens for tokens, _ in one_process()["all"]]
    for (_, found), (_, wanted) in zip(one_process()[how], one_process()["all"], strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


def test_of_texts_that_arrive_together_one_a_step_has_its_images_made_and_none_whose_client_has_gone() -> None:
    made, gone = one_process()["made at arrival"]
    assert [count for count in made if count] == [1, 1, 3, 1]
    assert (gone.tokens, gone.finish_reason) == ([], "stop")


def _changed(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> list[Any]:
    maker = opened(chunks, run, groups)
    return [
        told(write(chunks, run, groups, requests(changed=changed), maker=maker).texts)
        for changed in ([], [(3, 0), (4, 0)])
    ]


def test_another_image_changes_its_own_prompt_and_moves_the_others_by_exactly_0() -> None:
    (((before, after),),) = run_ranks(1, walk, [("vision, every expert", "one")], _changed)
    assert after[:3] == before[:3]
    for number in (3, 4):
        assert abs(before[number][1][0] - after[number][1][0]) > 1e-3
    # Of prompt 3 the first image alone was changed: what is generated sees the last one, but the keys before differ.


def test_an_image_is_made_once_for_all_texts_in_flight_that_have_it() -> None:
    images = sum(map(len, PLACES))
    assert one_process()["made together"] == images
    # Two rows at a time, and room for six pictures: an image that fell out is made again.
    assert images <= one_process()["made one by one"] <= 3 * images
    assert [tokens for tokens, _ in one_process()["samples"]] == 3 * [tokens for tokens, _ in one_process()["all"]]


def test_a_banned_token_is_never_drawn_and_log_probabilities_stay_the_model_s_own() -> None:
    (tokens, logprobs), first = one_process()["banned"]
    (whole, best) = one_process()["all"][3]
    assert whole[0] == first and first not in tokens
    logits = torch.from_numpy(trained()[3][1][0])
    assert logprobs[0] == pytest.approx(float(torch.log_softmax(logits, -1)[tokens[0]]), abs=CLOSE)
    assert logprobs[0] < best[0]


def _closed(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> tuple[Any, Any]:
    maker = opened(chunks, run, groups, gate=0.0)
    of_text = run_of("top2")
    text = write(build_model(of_text, groups), of_text, groups, [replace(one, images=()) for one in requests()])
    return told(write(chunks, run, groups, requests(), maker=maker).texts), told(text.texts)


def test_with_gates_at_0_it_says_what_its_text_model_says_to_the_bit() -> None:
    (((seeing, text),),) = run_ranks(1, walk, [("vision", "one")], _closed)
    assert seeing == text


def _cached(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    maker, found = opened(chunks, run, groups), {}
    blocks = [blocks_of(len(one.prompt) + one.max_tokens - 1) for one in requests()]
    room = Generator(chunks, run, groups, maker=maker).room
    layers = [index for chunk in chunks for index in decoder_layers(chunk)]
    one_image = rank_image_bytes(run.model, layers, tp=groups.layout.tp, value_bytes=4)
    for name, bytes_ in (
        ("all", sum(blocks) * room.block_bytes + len(blocks) * max(blocks) * room.layer_bytes + 6 * room.image_bytes),
        ("few", blocks[3] * (room.block_bytes + room.layer_bytes) + 3 * room.image_bytes),
    ):
        generator = Generator(chunks, run, groups, maker=maker, limits=Limits(cache_bytes=bytes_))
        texts = told(generator.generate_all(requests()))
        found[name] = ([tokens for tokens, _ in texts], generator.images.memory_bytes // one_image)
        assert generator.cache.memory_bytes + generator.images.memory_bytes <= bytes_
        generator.generate_all([replace(requests()[3], images=(), prompt=[5] * 33)] * 8)  # texts alone fill the cache
        assert [tokens for tokens, _ in told(generator.generate_all(requests()))] == found[name][0]
        assert generator.cache.memory_bytes + generator.images.memory_bytes <= bytes_
    with pytest.raises(ConfigError, match=rf"and 3 images needs {bytes_:,} bytes of cache"):
        Generator(chunks, run, groups, maker=maker, limits=Limits(cache_bytes=bytes_ - 1)).generate_all(requests())
    with pytest.raises(ConfigError, match="nothing here makes latents"):
        Generator(chunks, run, groups).generate_all(requests())
    return found


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_images_are_counted_in_the_cache_wait_for_room_and_are_refused_beforehand(layout: str) -> None:
    for (found,) in run_ranks(1 if layout == "one" else 2, walk, [("vision", layout)], _cached):
        assert found["all"][1] == 6
        assert found["few"] == (found["all"][0], 3)
