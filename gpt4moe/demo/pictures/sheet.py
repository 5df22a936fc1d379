"""Pictures with their texts as one PNG, for people."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gpt4moe.demo.pictures.drawing import Picture

_MARGIN, _LINE = 6, 13


Tile = tuple[Sequence[Picture], str]
"""Frames that stand side by side, and the text under them. Frames may have any size."""


def write_sheet(path: Path, tiles: Sequence[Tile], *, columns: int = 4, scale: int = 3) -> None:
    """
    Args:
        tiles: row after row.
        scale: every pixel becomes a square of so many.
    """
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = max(sum(frame.shape[1] * scale + 2 for frame in frames) for frames, _ in tiles) + 2 * _MARGIN
    width = max(width, 180)
    texts = [[textwrap.wrap(text, width // 7) or [""] for _, text in row] for row in rows]
    tallest = [max(frame.shape[0] for frames, _ in row for frame in frames) * scale for row in rows]
    heights = [tall + 2 * _MARGIN + _LINE * max(map(len, lines)) for tall, lines in zip(tallest, texts, strict=True)]
    sheet = Image.new("RGB", (width * columns, sum(heights)), (255, 255, 255))
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(size=11), 0
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for column, ((frames, _), said) in enumerate(zip(row, lines, strict=True)):
            left = column * width + _MARGIN
            for number, frame in enumerate(frames):
                large = np.repeat(np.repeat(frame, scale, axis=0), scale, axis=1)
                sheet.paste(Image.fromarray(large), (left + number * (large.shape[1] + 2), top + _MARGIN))
            for number, line in enumerate(said):
                y = top + _MARGIN + max(frame.shape[0] for frame in frames) * scale + 1 + _LINE * number
                draw.text((left, y), line, fill=(0, 0, 0), font=font)
        top += height
    sheet.save(path)
