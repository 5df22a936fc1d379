"""A vision model's logits by our own model, and by examples/load_vision.py, on the same pictures."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpt4moe.data.pictures import decode
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

ROOT = Path(__file__).resolve().parents[2]
Case = tuple[list[int], list[list[Path]]]
"""Tokens of a row, and its images: files of frames."""
SIZES = (
    "model.vocab_size=300", "model.num_layers=3", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.init_std=0.1", "training.steps=3", "optimizer.lr=0.01",
)  # fmt: skip
PARTS = (
    "stage=vision", "+vision@model.vision=tiny", "model.vision.encoder.image_size=16",
    "model.vision.encoder.hidden_size=16", "model.vision.encoder.num_layers=1",
    "model.vision.encoder.ffn_hidden_size=16", "model.vision.resampler.num_latents=4",
    "model.vision.cross_attention_every=2", "model.vision.ffn_hidden_size=24",
)  # fmt: skip
# What Idefics needs: as many keys as query heads, one width of MLPs, gated blocks that divide the layers, CLIP.
DENSE = (
    *SIZES, "model.moe=null", "model.ffn_hidden_size=24", "model.num_query_groups=4", "model.num_layers=4",
    "model.rope_theta=50000", "model.norm_epsilon=1e-4",
)  # fmt: skip
IMAGE_ID = 1
"""Special tokens come first: the end of text, then the image token."""


def rows_of(*images: list[list[Path]]) -> list[Case]:
    """A row of tokens for each list of images: text before the first image, and between them."""
    text, found = np.random.default_rng(0).integers(10, 250, 24).tolist(), []
    for clips in images:
        tokens = text[:4]
        for number in range(len(clips)):
            tokens = [*tokens, IMAGE_ID, *text[4 + 3 * number : 7 + 3 * number]]
        found.append(([*tokens, *text[16:]], clips))
    return found


def encoder_words(folder: Path) -> tuple[str, ...]:
    """Words of a run whose encoder is that of save_clip."""
    of = "model.vision.encoder"
    return f"{of}.kind=folder", f"{of}.folder={folder}", f"{of}.num_layers=2"


def save_clip(environment: Environment, folder: Path) -> None:
    """A CLIP encoder with norms and biases far from 1 and 0, and pixel statistics of its own."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, initializer_factor=20.0))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')


def pictures(folder: Path, count: int) -> list[Path]:
    """Images of random pixels, one of them a JPEG, one transparent, of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, paths = np.random.default_rng(3), []
    for number in range(count):
        channels = 4 if number == 1 else 3
        raw = draw.integers(0, 256, (9 + 4 * number, 20, channels), dtype=np.uint8)
        paths.append(folder / f"{number}.{'jpg' if number == 0 else 'png'}")
        Image.fromarray(raw).resize((40, 30)).save(paths[-1])
    return paths


def our_logits(checkpoint: Path, image_id: int, cases: Sequence[Case], *, gates: float | None = None) -> list[Any]:
    """[S, V] of each case, fp32. gates: the value of every gate; None: as trained."""
    return run_ranks(1, _ours, checkpoint, image_id, cases, gates)[0]


def their_logits(folder: Path, cases: Sequence[Case], loader: "Callable[..., Any] | None" = None) -> list[Any]:
    """[S, V] of each case, by examples/load_vision.py."""
    return run_ranks(1, loader or _theirs, folder, cases)[0]


def with_config(exported: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an export with another vision/config.json, and sums that fit."""
    shutil.copytree(exported, out)
    path = out / "vision" / "config.json"
    config = json.loads(path.read_text())
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    change(config)
    path.write_text(json.dumps(config))
    sums = out / "vision" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(path.read_bytes()).hexdigest()))
    return out


def example() -> Any:
    spec = importlib.util.spec_from_file_location("load_vision", ROOT / "examples" / "load_vision.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def _ours(
    environment: Environment, checkpoint: Path, image_id: int, cases: Sequence[Case], gates: float | None
) -> list[Any]:
    from gpt4moe.config.optimizer import Dtype
    from gpt4moe.inference.load import open_checkpoint, placed_run, read_chunks
    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.vision_encoder import FrozenEncoder
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.parallel.layout import Layout

    opened = open_checkpoint(checkpoint)
    run = placed_run(opened, Dtype.fp32)
    assert run.model.vision is not None
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, run.run.seed)
        chunk, vision = (built.eval() for built in build_model(run, groups))
        read_chunks(opened, [chunk, vision], groups)
        encoder = FrozenEncoder(run.model.vision.encoder, opened.run.run.seed, device, torch.float32)
        for name, parameter in chunk.named_parameters() if gates is not None else ():
            if name.endswith("_gate"):
                parameter.fill_(gates)
        found = []
        for tokens, images in cases:
            pixels = [torch.from_numpy(decode(path.read_bytes(), run.model.vision.encoder.image_size).copy())
                      for clip in images for path in clip]  # fmt: skip
            latents = None
            if images:
                features = encoder.features(torch.stack(pixels).permute(0, 3, 1, 2))
                latents = vision(features, [len(clip) for clip in images]).flatten(0, 1).unsqueeze(1)
            given = torch.tensor([tokens])
            extra = {"context": latents, "context_mask": (given == image_id).cumsum(1)}
            positions = torch.arange(len(tokens)).unsqueeze(0)
            found.append(chunk(given, positions, None, extra_block_kwargs=extra)[0].float().numpy())
        return found


def _theirs(environment: Environment, folder: Path, cases: Sequence[Case]) -> list[Any]:
    model = example().VisionModel(folder)
    return [model.logits(torch.tensor(tokens), images).numpy() for tokens, images in cases]
