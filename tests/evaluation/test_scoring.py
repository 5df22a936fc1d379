"""Scores on every layout are those of one process and the trainer's own forward pass."""

from functools import cache
from typing import Any

import pytest
import torch

from gpt4moe.config.run import RunConfig
from gpt4moe.evaluation import scoring
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.evaluation.scoring import Scorer
from gpt4moe.parallel.groups import ProcessGroups
from tests.inference.cases import LAYOUTS, MODELS, prompts, walk
from tests.spawn import run_ranks

CASES = [("top2", layout) for layout in LAYOUTS] + [
    (model, layout) for model in MODELS if model != "top2" for layout in ("pp2", "tp2-pp2-ep2")
]
PIECES = [
    Piece(tokens, scored)
    for tokens, scored in zip(prompts((5, 17, 2, 33, 65, 16, 40)), (4, 3, 1, 32, 64, 15, 7), strict=True)
]
Found = list[tuple[list[float], list[bool]]]


def _scores(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[str, Found]:
    """Of all pieces in a few passes, and of one piece alone (other copies then have none)."""
    scorer = Scorer(chunks, run, groups)
    scoring.MAX_PASS_TOKENS = 50
    scoring.SLICE_BYTES = 4 * run.model.vocab_size * 7  # the logits of seven tokens at a time
    found = {
        name: [(score.logprobs.tolist(), score.is_greedy.tolist()) for score in scorer.score(pieces)]
        for name, pieces in (("all", PIECES), ("one", PIECES[1:2]), ("none", []))
    }
    assert all(chunk.training for chunk in chunks) and torch.is_grad_enabled(), "chunks were left in evaluation"
    return found


@torch.no_grad()
def _in_one_process(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> Found:
    if run.model.moe is not None:
        run.model.moe.router.capacity_factor = None  # evaluation drops nothing
    (chunk,) = chunks
    chunk.eval()
    found = []
    for piece in PIECES:
        tokens = torch.tensor([piece.tokens])
        logits = chunk(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None], None)[0].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, tokens[0, 1:, None]).squeeze(1)
        right = logits.argmax(-1) == tokens[0, 1:]
        found.append((logprobs[-piece.num_scored :].tolist(), right[-piece.num_scored :].tolist()))
    return found


@cache
def one_process() -> dict[str, Found]:
    (found,) = run_ranks(1, walk, [(model, "one") for model in MODELS], _in_one_process)
    return dict(zip(MODELS, found, strict=True))


@cache
def four_ranks() -> dict[tuple[str, str], list[Any]]:
    """Of each case what each rank found; the ranks start once."""
    answers = run_ranks(4, walk, CASES, _scores)
    return {case: [answer[at] for answer in answers] for at, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_every_rank_has_the_scores_of_one_process(case: tuple[str, str]) -> None:
    wanted = one_process()[case[0]]
    for found in four_ranks()[case]:
        assert found["none"] == []
        for some, right in ((found["all"], wanted), (found["one"], wanted[1:2])):
            assert len(some) == len(right)
            for (logprobs, greedy), (right_logprobs, right_greedy) in zip(some, right, strict=True):
                assert logprobs == pytest.approx(right_logprobs, abs=1e-5, rel=1e-5)
                assert greedy == right_greedy


def test_one_process_scores_as_the_trainer_does() -> None:
    (found,) = run_ranks(1, walk, [("top2", "one")], _scores)
    for (logprobs, greedy), (right, right_greedy) in zip(found[0]["all"], one_process()["top2"], strict=True):
        assert logprobs == pytest.approx(right, abs=1e-5, rel=1e-5) and greedy == right_greedy
    assert 0 < sum(sum(greedy) for _, greedy in one_process()["top2"]) < sum(piece.num_scored for piece in PIECES)
