"""An image that one copy of the model cannot read ends all of them, with its cause: none waits for the others."""

from typing import Any

from gpt4moe.config.run import RunConfig
from gpt4moe.errors import DataError, Gpt4MoeError
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.evaluation.scoring import Scorer
from gpt4moe.inference.pictures import Picture, Pixels, picture
from gpt4moe.parallel.groups import ProcessGroups
from tests.inference.cases import walk
from tests.inference.test_images import IMAGE, opened, pixels
from tests.spawn import run_ranks


def _gone() -> Pixels:
    raise DataError("The picture is gone.", "Put it back.")


def _unread(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> tuple[str, float]:
    """What scoring says of an image of the second copy alone; the score of the other piece afterwards."""
    scorer = Scorer(chunks, run, groups, opened(chunks, run, groups))
    good, bad = (Piece([IMAGE, 5, 6, 7], 3, [one]) for one in (picture(pixels(1), 0), Picture(0, "gone", _gone)))
    try:
        scorer.score([good, bad])
        said = ""
    except Gpt4MoeError as error:
        said = error.cause
    return said, scorer.score([good])[0].total


def test_an_image_that_one_copy_cannot_read_ends_all_copies_with_its_cause() -> None:
    layouts = [("vision", "one"), ("vision", "etp2")]  # copies apart, and copies that meet in the experts
    first, second = run_ranks(2, walk, layouts, _unread)
    assert first == second and [said for said, _ in first] == ["The picture is gone."] * 2
    assert all(total < 0 for _, total in first)
