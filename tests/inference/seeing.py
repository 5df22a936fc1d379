"""A small run that reads images, with open gates, and what it is asked: for tools/generate.py and the server."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gpt4moe.data.tokenizer import train_tokenizer
from tests.training.command import train

SIDE = 16
VISION = (
    "stage=vision", "+vision@model.vision=tiny", f"model.vision.encoder.image_size={SIDE}",
    "model.vision.encoder.hidden_size=16", "model.vision.encoder.num_layers=1",
    "model.vision.encoder.ffn_hidden_size=16", "model.vision.resampler.num_latents=4",
    "model.vision.resampler.max_frames=3", "model.vision.ffn_hidden_size=24",
)  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def png(number: int, size: tuple[int, int] = (20, 12)) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def make_place(root: Path) -> Path:
    """A vision run `seeing` with open gates and a chat template, a text run `blind`, images, a clip, prompts."""
    texts = [f"word{i} and other_{i % 7} things, 12 + {i}?\n" for i in range(200)]
    tokenizer = root / "tokenizer.json"
    train_tokenizer(texts, vocab_size=300, special=["<image>"]).backend.save(str(tokenizer))
    (root / "tokenizer").mkdir()  # what data of conversations has
    (root / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (root / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    text = ("model.seq_length=64", "model.vocab_size=300", f"data.tokenizer={tokenizer}", "model.init_std=0.3",
            "training.steps=1", "model.num_attention_heads=4", "model.num_query_groups=2")  # fmt: skip
    # The gates open by the learning rate in one step; decay would close them.
    for name, more in (("seeing", (*VISION, "optimizer.lr=0.05", "schedule.warmup_steps=0")), ("blind", ())):
        (ended,) = train(root / name, *text, *more)
        assert ended.status == 0, ended.err
    for number in range(3):
        (root / f"{number}.png").write_bytes(png(number))
    (root / "clip").mkdir()
    for number in (2, 10):
        (root / "clip" / f"{number}.png").write_bytes(png(number))
    rows: list[dict[str, Any]] = [
        {"id": "one", "prompt": "<image>word 1", "images": ["0.png"]},
        {"id": "two", "prompt": "word <image> and <image>", "images": ["1.png", ["clip/2.png", "clip/10.png"]]},
        {"id": "text", "prompt": "word 1"},
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
