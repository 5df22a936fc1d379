"""The contrastive loss, and what the encoder is shown."""

import json
import math
from pathlib import Path

import pytest
import torch

from gpt4moe.config.vision import EncoderConfig
from gpt4moe.demo.contrastive import (
    KINDS_SHOWN,
    Contrast,
    Course,
    PairSet,
    _fresh,
    learned_pairs,
    learning_rate_share,
    near_loss,
    pairs_of,
    sigmoid_loss,
    top_1,
)
from gpt4moe.demo.pictures.items import KINDS, items
from gpt4moe.demo.pictures.splits import Split


def test_the_loss_is_that_of_siglip_written_out() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    is_true = torch.tensor([[True, False], [False, True]])
    terms = [math.log(1 + math.exp(-sign * value)) for sign, value in ((1, 2.0), (-1, -1.0), (-1, 0.5), (1, 3.0))]
    assert sigmoid_loss(logits, is_true).item() == pytest.approx(sum(terms) / 2, rel=1e-6)
    assert top_1(logits, is_true) == 1 and top_1(-logits, is_true) == 0


def _clips_and_words() -> PairSet:
    return PairSet(
        [pair for kind in ("clips", "words") for item in items(kind, 0, 6, "learned") for pair in pairs_of(item)]
    )


def test_equal_captions_are_true_of_each_others_images() -> None:
    found = _clips_and_words()
    _, _, is_true = found.batch(torch.arange(len(found.pixels)))
    assert is_true[0, :4].all() and is_true.sum() < is_true.numel() and (is_true == is_true.T).all()


def test_of_grey_images_the_texts_name_no_colour_and_are_true_of_the_coloured_ones() -> None:
    pairs = PairSet([pair for item in items("attributes", 0, 6, "learned") for pair in pairs_of(item)])
    chosen = torch.tensor([0, 1, 0, 1])
    assert pairs.words[0].tolist() != pairs.words[1].tolist()
    pixels, words, is_true = pairs.batch(chosen, 2)
    assert (pixels[:2, 0] == pixels[:2, 2]).all() and (pixels[2:] == pairs.pixels[chosen[2:]]).all()
    has_colour = torch.tensor([name.endswith("colour") for name in pairs.places])
    assert (words[:2, has_colour] < 0).all() and (words[2:] == pairs.words[chosen[2:]]).all()
    assert (words[:2, ~has_colour] == words[2:, ~has_colour]).all() and (words[2:, has_colour] >= 0).any(1).all()
    assert is_true[2, 0] and is_true[3, 1] and not is_true[0, 2] and not is_true[2, 1]


def test_an_image_is_compared_with_every_text_that_is_wrong_in_one_word() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(image_size=32, patch_size=8, hidden_size=16, num_layers=1, num_attention_heads=2,
                           ffn_hidden_size=16)  # fmt: skip
    pairs = _clips_and_words()
    model = Contrast(_fresh(config), 16, pairs.place_of)
    pixels, words, _ = pairs.batch(torch.arange(len(pairs.pixels)))
    _, near = model(pixels, words)
    seen, losses, compared = model.seen(pixels), [], 0
    for image, text in enumerate(words):
        for place in (text >= 0).nonzero().flatten().tolist():
            logits = []
            for word in (pairs.place_of == place).nonzero().flatten().tolist():
                changed = text.clone()
                changed[place] = word
                said = torch.nn.functional.normalize(model.said(changed[None]), dim=-1)
                logits.append((seen[image] @ said[0]) * model.log_scale.exp())
                assert near[image, word].item() == pytest.approx(logits[-1].item(), abs=1e-5)
                compared += 1
            own = int((pairs.place_of[: text[place]] == place).sum())
            losses.append(-torch.stack(logits).log_softmax(0)[own])
    loss, shares = near_loss(near, words, pairs.place_of)
    assert compared > 100 and len(shares) == len(pairs.places) == 5
    assert loss.item() == pytest.approx(torch.stack(losses).sum().item() / len(words), rel=1e-5)


def test_the_two_captions_of_two_shapes_say_the_same() -> None:
    for item in items("relations", 0, 40, "learned"):
        (pair,) = pairs_of(item)
        said = dict(word.split("=") for word in pair.said)
        assert said["relation"] in ("above", "left of") and len(said) == 7
        assert [
            said[f"{item.fields['relation']} {name}"] for name in ("size", "colour", "shape")
        ] == item.prompt.split()[1:4]


def test_no_item_of_few_shot_is_shown_and_no_direction_of_a_clip() -> None:
    assert set(KINDS_SHOWN) == set(KINDS) - {"few_shot"}
    for item in items("clips", 0, 5, "learned"):
        assert [pair.said for pair in pairs_of(item)] == [pairs_of(item)[0].said] * 4
        assert not any("direction" in word for word in pairs_of(item)[0].said)


def test_of_a_clip_one_frame_is_shown_and_not_always_the_same(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps({"seed": 0, "learned": dict.fromkeys(KINDS, 0) | {"clips": 5}}))
    frames = [item.images[0] for item in items("clips", 0, 5, "learned")]
    shown = [next(n for n, frame in enumerate(clip) if (frame == pair.picture).all())
             for clip, pair in zip(frames, learned_pairs(tmp_path), strict=True)]  # fmt: skip
    assert shown == [0, 1, 2, 3, 0]


def test_the_learning_rate_rises_stays_and_falls() -> None:
    course = Course(steps=100, warmup_steps=10)
    shares = [learning_rate_share(step, course) for step in range(100)]
    assert shares[0] == 0.1 and shares[10:50] == [1.0] * 40 and shares[-1] == 0.05


def test_the_encoder_is_shown_no_held_out_combination_pair_or_word(tmp_path: Path) -> None:
    counts = {"attributes": 400, "relations": 400, "words": 400, "clips": 20, "few_shot": 0}
    (tmp_path / "set.json").write_text(json.dumps({"seed": 0, "learned": counts}))

    def meaning(said: tuple[str, ...]) -> frozenset[str]:
        """What is held out of two shapes goes without their sizes."""
        return frozenset(word for word in said if "relation" not in " ".join(said) or "size" not in word)

    learned = {meaning(pair.said) for pair in learned_pairs(tmp_path)}
    splits: tuple[Split, ...] = ("valid", "asked")
    held = {
        meaning(pair.said)
        for kind in ("attributes", "relations", "words")
        for split in splits
        for item in items(kind, 0, 200, split)
        for pair in pairs_of(item)
    }
    assert len(held) > 500 and len(learned) > 700 and not held & learned
