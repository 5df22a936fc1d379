"""The image encoder of `make vision`, trained by captions alone: a small SigLIP (arXiv:2303.15343).

    pixels -> SiglipVisionModel -> patches, pooled -> one vector ---+
                                                                    +-> scaled product of all pairs of a batch
    what a caption says, each word with its place -> one vector ----+     -> sigmoid loss: is this caption the image's?

The text side is a bag of (place in the caption, word). It is thrown away; the encoder is saved as a folder of
transformers. Besides its caption an image is shown every text that is wrong in one word (arXiv:2210.01936): of all with
another word in the same place it has to find its own. Some images of a batch are grey, and their texts name no colour.
A frame of a clip is an image without a direction; one of each clip is shown. Items of few_shot are not.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt4moe.config.load import load_run_config
from gpt4moe.config.vision import EncoderConfig
from gpt4moe.demo.made_of import require_made_of
from gpt4moe.demo.pictures.drawing import Picture
from gpt4moe.demo.pictures.items import OPPOSITE, OTHER_WAY, Item, items
from gpt4moe.demo.pictures.make import SET_NAME
from gpt4moe.errors import DataError, Gpt4MoeError
from gpt4moe.runlog.command_line import print_error

_NUM_QUERIES, _MEANING = 12, 256
"""Queries that pool an image's patches; width of what images and texts are compared in."""
KINDS_SHOWN = ("attributes", "relations", "words", "clips")
_OWN_WORDS = ("size", "colour", "shape")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image, and what its caption says: "PLACE=WORD"."""

    picture: Picture
    said: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How the encoder is trained."""

    steps: int = 2400
    batch_size: int = 64
    lr: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.2
    """As CLIP's (arXiv:2103.00020). With torch's 0.01 shapes are known by their learned combinations."""
    num_grey: int = 24
    """Of a batch, shown without colours: else shapes are learned for each colour by itself (arXiv:2002.05709)."""
    seed: int = 0


def pairs_of(item: Item) -> list[Pair]:
    """A pair for each frame. A shape's words are said with its place in the picture, so that of two each is looked for
    where it is, and the two captions (a above b, b below a) say the same."""
    said = {name: word for name, word in item.fields.items() if name != "direction"}
    if item.kind == "attributes":
        said = {"place": said["place"], **_placed(said["place"], said)}
    if item.kind == "relations":
        first = dict(zip(_OWN_WORDS, item.prompt.split()[1:4], strict=True))
        relation = OTHER_WAY.get(said["relation"], said["relation"])
        places = (said["relation"], OPPOSITE[said["relation"]])
        said = {"relation": relation, **_placed(places[0], first), **_placed(places[1], said)}
    words = tuple(f"{place}={word}" for place, word in said.items())
    return [Pair(frame, words) for frames in item.images for frame in frames]


def _placed(place: str, words: dict[str, str]) -> dict[str, str]:
    return {f"{place} {name}": words[name] for name in _OWN_WORDS}


class Contrast(nn.Module):
    """Both sides and their products. Letters: B images, P places of a text, V words, M what both are compared in."""

    def __init__(self, encoder: nn.Module, width: int, place_of: Tensor):
        """
        Args:
            place_of: the place of each word, [V].
        """
        super().__init__()
        self.encoder, self.norm = encoder, nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(_NUM_QUERIES, width))
        self.head = nn.Linear(_NUM_QUERIES * width, _MEANING)
        self.place_of, self.table = place_of, nn.Parameter(torch.randn(len(place_of), _MEANING) * 0.3)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """How well each image fits each text, [B, B], and how well it fits its own text with word v in v's place,
        [B, V]; without meaning where its text has no such place. Logits.

        Args:
            pixels: [B, 3, side, side] uint8.
            words: of each image's text the word in each place, [B, P]; -1: it has no such place.
        """
        seen, said, table = self.seen(pixels), self.said(words), self.table
        products = seen @ nn.functional.normalize(said, dim=-1).T
        # The same with one word replaced, without making all those texts: sums and lengths change by two words.
        replaced = words[:, self.place_of].clamp(min=0)
        of_words, of_said, gram = seen @ table.T, said @ table.T, table @ table.T
        dots = (seen * said).sum(-1, keepdim=True) - of_words.gather(1, replaced) + of_words
        squares = (said * said).sum(-1, keepdim=True) + 2 * (of_said - of_said.gather(1, replaced))
        squares = squares + gram.diagonal()[replaced] + gram.diagonal() - 2 * gram[replaced, torch.arange(len(table))]
        near = dots * squares.clamp(min=1e-6).rsqrt()
        return products * self.log_scale.exp() + self.bias, near * self.log_scale.exp()

    def seen(self, pixels: Tensor) -> Tensor:
        """[B, M], of length 1."""
        features = self.norm(self.encoder(pixel_values=pixels.float() / 127.5 - 1).last_hidden_state)
        weights = (self.queries @ features.mT / features.shape[-1] ** 0.5).softmax(-1)
        return nn.functional.normalize(self.head((weights @ features).flatten(1)), dim=-1)

    def said(self, words: Tensor) -> Tensor:
        """The sum of a text's words, [B, M]."""
        return (self.table[words.clamp(min=0)] * (words >= 0).unsqueeze(-1)).sum(1)


def sigmoid_loss(logits: Tensor, is_true: Tensor) -> Tensor:
    """-sum over all images and texts of log sigmoid(z * logit) / B, z = 1 where the text is true of the image, else -1.

    SigLIP, arXiv:2303.15343, equation 1; there z is 1 on the diagonal alone, here several images of a batch may have
    equal captions.

    Args:
        logits, is_true: [B, T].
    """
    return -nn.functional.logsigmoid(logits * (2.0 * is_true - 1)).sum() / len(logits)


class PairSet:
    """Pairs as tensors."""

    def __init__(self, pairs: Sequence[Pair]):
        self.vocabulary = sorted({word for pair in pairs for word in pair.said})
        self.places = sorted({place_in(word) for word in self.vocabulary})
        self.place_of = torch.tensor([self.places.index(place_in(word)) for word in self.vocabulary])
        self.pixels = torch.from_numpy(np.stack([pair.picture for pair in pairs])).permute(0, 3, 1, 2)
        self.words = torch.full((len(pairs), len(self.places)), -1)
        numbers = {word: number for number, word in enumerate(self.vocabulary)}
        for row, pair in zip(self.words, pairs, strict=True):
            said = torch.tensor([numbers[word] for word in pair.said])
            row[self.place_of[said]] = said

    def batch(self, chosen: Tensor, num_grey: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels and words [B, P] of some pairs, and which text is true of which image [B, B].

        Args:
            num_grey: so many of the first are shown without colours, and their texts name none.
        """
        pixels, words = self.pixels[chosen], self.words[chosen]
        grey = pixels[:num_grey].float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
        pixels[:num_grey] = grey
        words[:num_grey, [place for place, name in enumerate(self.places) if name.endswith("colour")]] = -1
        is_said = (words.unsqueeze(1) == words) | (words < 0)  # [image, text, place]
        return pixels, words, is_said.all(-1)


def place_in(word: str) -> str:
    return word.partition("=")[0]


def near_loss(near: Tensor, words: Tensor, place_of: Tensor) -> tuple[Tensor, list[float]]:
    """Of the texts that differ from an image's own in one place alone: -log of the softmax of its own, summed over
    places, the mean over images; and the share of images that find their own, of each place (nan: no text has it).

    Args:
        near: [B, V] of Contrast.forward.
        words: [B, P].
        place_of: [V].
    """
    losses, shares = [], []
    for place in range(words.shape[1]):
        rows, own = words[:, place] >= 0, place_of == place
        logits = near[rows][:, own]
        target = words[rows, place] - int(own.nonzero()[0])  # words of a place follow each other
        losses.append(nn.functional.cross_entropy(logits, target, reduction="sum"))
        shares.append(float((logits.argmax(1) == target).float().mean()))
    return torch.stack(losses).sum() / len(words), shares


def train(config: EncoderConfig, learned: Sequence[Pair], course: Course, tell: Callable[[str], None]) -> Contrast:
    """A function of its arguments and of the number of threads.

    Args:
        config: sizes of the encoder.
        tell: gets a line now and then.
    """
    torch.manual_seed(course.seed)
    pairs, generator = PairSet(learned), torch.Generator().manual_seed(course.seed)
    model = Contrast(_fresh(config), config.hidden_size, pairs.place_of)
    optimizer = torch.optim.AdamW(model.parameters(), course.lr, weight_decay=course.weight_decay)
    began = time.monotonic()
    for step in range(course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.lr * learning_rate_share(step, course)
        chosen = torch.randint(len(learned), (course.batch_size,), generator=generator)
        pixels, words, is_true = pairs.batch(chosen, course.num_grey)
        logits, near = model(pixels, words)
        of_near, shares = near_loss(near, words, pairs.place_of)
        loss = sigmoid_loss(logits, is_true) + of_near
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == course.steps:
            worst = min(zip(shares, pairs.places, strict=True))
            tell(f"step {step + 1}: loss {loss.item():.3f}, {top_1(logits, is_true):.0%} find their caption among "
                 f"{len(words)}, {worst[0]:.0%} their {worst[1]}, {time.monotonic() - began:.0f} s")  # fmt: skip
    return model


def _fresh(config: EncoderConfig) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    encoder: nn.Module = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
            image_size=config.image_size, patch_size=config.patch_size, vision_use_head=False,
            hidden_act="gelu",  # a sixth of an encoder's time less than the tanh of SigLIP's own
        )
    )  # fmt: skip
    for name, parameter in encoder.named_parameters():
        if "position" in name:
            nn.init.normal_(parameter, std=0.2)  # from 0.02 patches would hardly know where they are
    return encoder


def learning_rate_share(step: int, course: Course) -> float:
    """Rises, stays for half of the course, and falls to a twentieth."""
    left = 1 - step / course.steps
    return min(1.0, (step + 1) / course.warmup_steps, max(0.05, 2 * left))


def top_1(logits: Tensor, is_same: Tensor) -> float:
    """The share of images whose nearest text says what they show."""
    return float(is_same[torch.arange(len(logits)), logits.argmax(1)].float().mean())


def learned_pairs(folder: Path) -> list[Pair]:
    """Of the items to learn of a drawn set, drawn again: one each, of a clip one frame after another in turn."""
    said = json.loads((folder / SET_NAME).read_text())
    found = []
    for kind in KINDS_SHOWN:
        for number, item in enumerate(items(kind, said["seed"], said["learned"][kind], "learned")):
            pairs = pairs_of(item)
            found.append(pairs[number % len(pairs)])
    return found


def encoder_made_of(folder: Path, config: EncoderConfig, course: Course) -> dict[str, Any]:
    """What the encoder of a drawn set follows from."""
    sizes = {name: value for name, value in asdict(config).items() if name not in ("kind", "folder")}
    return {"set": json.loads((folder / SET_NAME).read_text()), "encoder": sizes, "course": asdict(course)}


def main(arguments: list[str]) -> int:
    """Exit status: 0 saved or there already, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m gpt4moe.demo.contrastive", description=__doc__.splitlines()[0])
    parser.add_argument("--set", type=Path, default=Path("data/drawn"), help="the drawn set (data/drawn)")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the encoder in")
    parser.add_argument("--steps", type=int, default=Course().steps, help=f"of training ({Course().steps})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("overrides", nargs="*", help="of +experiment=tiny_vision: model.vision.encoder.num_layers=3")
    given = parser.parse_args(arguments)
    course = Course(steps=given.steps, seed=given.seed)
    try:
        run = load_run_config(["+experiment=tiny_vision", "run.name=encoder", *given.overrides])
        if not (given.set / SET_NAME).is_file():
            raise DataError(f"{given.set} has no {SET_NAME}.", "Draw it: python -m gpt4moe.demo.pictures.make")
        assert run.model.vision is not None
        config = run.model.vision.encoder
        require_made_of(given.out, encoder_made_of(given.set, config, course))
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    if given.out.exists():
        print(f"{given.out} is there already, made of the same.")
        return 0
    torch.set_num_threads(1)  # of more threads the weights would depend
    model = train(config, learned_pairs(given.set), course, lambda line: print(line, flush=True))
    draft = given.out.with_name(f".{given.out.name}.draft")
    model.encoder.save_pretrained(draft)
    draft.replace(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
