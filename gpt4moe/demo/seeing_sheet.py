"""Where a vision model looks while it answers: a sheet of held-out pictures, each word over what it came from.

    a word --attention of the gated blocks--> latents --attention of the resampler--> patches

For each word both are averaged over heads; blocks count by the size of their gate, resampler layers alike. The product
says how much each patch may have given to the word. It is no proof that it did: values and later layers are left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt4moe.demo.pictures.drawing import SIDE, Picture
from gpt4moe.demo.pictures.items import Item
from gpt4moe.demo.pictures.sheet import Tile, write_sheet
from gpt4moe.demo.seeing_answers import Examiner
from gpt4moe.inference.load import LoadedModel

_COLUMNS = 6
_TOLD = {"a", "at", "moves", "of", "the", "."}
"""Words that no picture tells; the sheet leaves them out."""


def write_answers(path: Path, model: LoadedModel, examiner: Examiner, items: Sequence[Item]) -> None:
    """A row for each item of one image or clip: its picture with the answer, then each word of the answer."""
    tiles: list[Tile] = []
    for item in items:
        said = examiner.ask([item]).texts[0].strip()
        mark = "right" if said.split(".")[0] == item.answer.strip().split(".")[0] else f"not: {item.answer.strip()}"
        frames = item.images[0]
        tiles.append((frames[:1] if len(frames) == 1 else frames[::3], f"{said} ({mark})"))
        words = [one for one in word_maps(model, examiner, item, f" {said}") if one[0] not in _TOLD][: _COLUMNS - 1]
        tiles += [([_lit(frame, part) for frame, part in zip(frames[::3], maps[::3], strict=True)], word)
                  for word, maps in words]  # fmt: skip
        tiles += [([np.full((SIDE, SIDE, 3), 255, np.uint8)], "")] * (_COLUMNS - 1 - len(words))
    write_sheet(path, tiles, columns=_COLUMNS)


@torch.no_grad()
def word_maps(model: LoadedModel, examiner: Examiner, item: Item, answer: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Of each token of an answer: the text, and what each patch gave to it, [frames, rows, columns]; it sums to at most
    1 over all patches. Items of one image."""
    prompt = examiner.sight.encode(item.prompt, 1, is_chat=False, what=item.key)
    tokens = prompt + examiner.sight.words.encode(answer, is_chat=False)
    frames = torch.from_numpy(np.stack(item.images[0])).permute(0, 3, 1, 2)
    maker = examiner.generator.images.maker
    assert maker is not None and model.resampler is not None
    batch = torch.tensor([tokens])
    media = (batch == examiner.sight.image_id).cumsum(1)
    with _recorded(model) as (of_latents, of_words):
        latents = model.resampler(maker.encoder.features(frames), [len(frames)])
        kwargs = {"context": latents.transpose(0, 1), "context_mask": media}
        model.chunk(batch, torch.arange(len(tokens)).unsqueeze(0), None, extra_block_kwargs=kwargs)
    patches = torch.stack(of_latents()).mean(0)  # [L, F * P]
    weights = torch.stack(of_words())  # [S, L], the sum over blocks
    given = weights.mean(0) @ patches
    side = math.isqrt(given.shape[1] // len(frames))
    for at in range(len(prompt), len(tokens)):
        word = examiner.sight.words.decode([tokens[at]]).strip()
        # A token is made at the place before its own.
        yield word, given[at - 1].view(len(frames), side, side).numpy()


Read = Callable[[], list[Tensor]]


@contextmanager
def _recorded(model: LoadedModel) -> Iterator[tuple[Read, Read]]:
    """Attention of one forward call: of each resampler layer [L, patches], of each gated block [S, L], times its gate's
    share of all gates."""
    made: dict[Any, Tensor] = {}
    assert model.resampler is not None
    resampler: Any = model.resampler.resampler
    blocks = [one for one in model.chunk.modules() if type(one).__name__ == "GatedCrossAttention"]
    parts = [part for one in (*resampler.layers, *blocks) for part in (one.linear_q, one.linear_kv)]

    def keep(part: Any, _: Any, out: Any) -> None:
        made[part] = out[0] if isinstance(out, tuple) else out

    hooks = [part.register_forward_hook(keep) for part in parts]

    def of_latents() -> list[Tensor]:
        found = []
        for layer in resampler.layers:
            query, key = made[layer.linear_q][0], made[layer.linear_kv][0].chunk(2, dim=-1)[0]
            found.append(_attention(query, key, layer.num_heads)[:, : len(key) - len(query)])
        return found

    def of_words() -> list[Tensor]:
        gates = torch.stack([block.attention_gate.tanh().abs().squeeze() for block in blocks])
        shares, found = gates / gates.sum().clamp(min=1e-9) * len(blocks), []
        for share, block in zip(shares, blocks, strict=True):
            query, both = made[block.linear_q][:, 0], made[block.linear_kv][:, 0]
            size = block.head_size
            key = both.unflatten(-1, (-1, 2 * size))[..., :size].flatten(-2)
            found.append(share * _attention(query, key, query.shape[-1] // size))
        return found

    try:
        yield of_latents, of_words
    finally:
        for hook in hooks:
            hook.remove()


def _attention(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """[Q, N * D], [K, N * D] -> softmax over K, the mean over heads, [Q, K]."""
    q, k = (one.unflatten(-1, (num_heads, -1)).transpose(0, 1) for one in (query, key))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(0)


def _lit(picture: Picture, given: NDArray[Any]) -> Picture:
    """A picture, darker where little came from."""
    share = given / max(float(given.max()), 1e-9)
    scale = SIDE // share.shape[0]
    light = np.kron(0.15 + 0.85 * share, np.ones((scale, scale)))[..., None]
    return np.clip(picture * light, 0, 255).astype(np.uint8)
