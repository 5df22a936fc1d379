"""An image that one copy of the model, or one rank of it, cannot read ends all of them, with its cause: none waits for
the others, and the next call finds nothing of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from gpt4moe.config.run import RunConfig
from gpt4moe.errors import DataError, Gpt4MoeError
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.evaluation.scoring import Scorer
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.pictures import Picture, Pixels, picture
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.parallel.groups import ProcessGroups
from tests.inference.cases import walk
from tests.inference.test_images import IMAGE, opened, pixels
from tests.spawn import run_ranks

LAYOUTS = ("one", "etp2", "tp2", "pp2")
"""On two ranks: copies apart, copies that meet in the experts; one copy, of which the second rank cannot read."""


def _gone(groups: ProcessGroups) -> Pixels:
    if groups.layout.dp == 2 or groups.rank == 1:
        raise DataError("The picture is gone.", "Put it back.")
    return pixels(2)


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except Gpt4MoeError as error:
        return error.cause
    return ""


def _unread(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> tuple[str, float, str, list[int]]:
    """What is said of an image of the second copy alone, by scoring and by generation; the other text afterwards."""
    maker = opened(chunks, run, groups)
    images = [[picture(pixels(1), 0)], [Picture(0, "gone", partial(_gone, groups))]]
    scorer = Scorer(chunks, run, groups, maker)
    pieces = [Piece([IMAGE, 5, 6, 7], 3, some) for some in images]
    unscored = _said(lambda: scorer.score(pieces))
    generator = Generator(chunks, run, groups, maker=maker)
    requests = [
        Request(prompt=[IMAGE, 5, 6, 7], max_tokens=6, sampling=Sampling(temperature=0), images=some)
        for some in images
    ]  # fmt: skip
    unwritten = _said(lambda: generator.generate_all(requests))
    (text,) = generator.generate_all(requests[:1])
    return unscored, scorer.score(pieces[:1])[0].total, unwritten, text.tokens


def test_an_image_that_one_rank_cannot_read_ends_all_ranks_with_its_cause() -> None:
    first, second = run_ranks(2, walk, [("vision", layout) for layout in LAYOUTS], _unread)
    assert first == second
    for unscored, total, unwritten, tokens in first:
        assert unscored == unwritten == "The picture is gone."
        assert total < 0 and tokens == first[0][3]
