"""loss.png is drawn without a display, for runs of any length, and shows what it is given."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from gpt4moe.pages.plots import BLUE, ORANGE, plot_loss
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_columns import MetricColumns
from tests.runlog.synthetic import falling_loss


def has_colour(path: Path, colour: str) -> bool:
    """Whether a pixel of the PNG has exactly this colour."""
    wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return bool((pixels == wanted).all(axis=1).any())


@pytest.mark.parametrize("records", [[], falling_loss(1), falling_loss(50)], ids=["none", "one", "fifty"])
def test_a_loss_curve_of_any_length_is_drawn(tmp_path: Path, records: list[Record]) -> None:
    plot_loss(tmp_path / "loss.png", MetricColumns(records), title="t", levels={"unigram entropy": 6.0})
    height, width = imread(tmp_path / "loss.png").shape[:2]
    assert (width, height) == (1260, 700)


def test_training_and_held_out_loss_are_in_the_picture(tmp_path: Path) -> None:
    plot_loss(tmp_path / "both.png", MetricColumns(falling_loss(50)), title="t", x="step")
    plot_loss(tmp_path / "train.png", MetricColumns(falling_loss(9)), title="t", x="step")
    assert has_colour(tmp_path / "both.png", BLUE) and has_colour(tmp_path / "both.png", ORANGE)
    assert not has_colour(tmp_path / "train.png", ORANGE)
