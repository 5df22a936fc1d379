"""Scorers by name: the model's own log-likelihood, the majority of answers, a checker, a command."""

import math
import shlex
from collections.abc import Sequence

from gpt4moe.errors import CheckpointError, ConfigError
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.inference.load import LoadedModel
from gpt4moe.inference.text import Words
from gpt4moe.refinement.outside import CheckerScorer, CommandScorer, OutsideScorer
from gpt4moe.refinement.search import Drawn, Plan, Scorer
from gpt4moe.refinement.tasks import require_text

EMPTY = -1e4
"""Score of a text without tokens: below every mean log-probability."""


class Likelihood:
    """Mean log-probability of a text's tokens behind its task alone, in nats.

    Not behind the prompt it was drawn from: there the best so far stands, and a text that repeats it would look likely.
    """

    def __init__(self, model: LoadedModel, words: Words, plan: Plan):
        # Imported here: it imports DeepSpeed, which looks for an accelerator then (inference.load.placed).
        from gpt4moe.evaluation.scoring import Scorer as LogProbabilities

        self.words, self.plan = words, plan
        self.scorer = LogProbabilities(model.chunks, model.run, model.groups)
        self.found: dict[str | int, float] = {}

    def prepare(self, drawn: Sequence[Drawn]) -> None:
        self.found, again = {}, []
        for one in drawn:
            name = one.course.task.id
            if not one.done.tokens:
                self.found[name] = EMPTY
            elif one.course.candidates and self.plan.method == "refine":
                again.append(one)
            else:
                self.found[name] = sum(one.done.logprobs) / len(one.done.tokens)
        if not again:
            return
        for one, score in zip(again, self.scorer.score([self._piece(one) for one in again]), strict=True):
            self.found[one.course.task.id] = score.total / len(score.logprobs)

    def _piece(self, one: Drawn) -> Piece:
        prompt = self.plan.first_template.format(task=one.course.task.text, best="", score="", round=0)
        if self.plan.is_chat:
            prompt = self.words.render([{"role": "user", "content": prompt}])
        before = self.words.encode(prompt, is_chat=self.plan.is_chat)
        return Piece([*before, *one.done.tokens], len(one.done.tokens))

    def score(self, drawn: Drawn) -> float:
        found = self.found[drawn.course.task.id]
        if not math.isfinite(found):
            raise CheckpointError(
                f"The mean log-probability of a text for task {drawn.course.task.id!r} is {found}.",
                "The weights have numbers that are not finite: use an earlier checkpoint.",
            )
        return found

    def close(self) -> None:
        return


class Majority:
    """How many candidates of the task, this one included, have its answer. An answer of no characters counts as 0."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def prepare(self, drawn: Sequence[Drawn]) -> None:
        return

    def score(self, drawn: Drawn) -> float:
        answer = self.plan.answer_of(drawn.text)
        return 1.0 + sum(one.answer == answer for one in drawn.course.candidates) if answer else 0.0

    def close(self) -> None:
        return


class Outside:
    """A checker or a command, on the first rank."""

    def __init__(self, scorer: OutsideScorer | None):
        self.scorer = scorer

    def prepare(self, drawn: Sequence[Drawn]) -> None:
        return

    def score(self, drawn: Drawn) -> float:
        assert self.scorer is not None, "only the first rank asks"
        return self.scorer.score(drawn.course.task, drawn.text)

    def close(self) -> None:
        if self.scorer is not None:
            self.scorer.close()


def make_scorer(name: str, plan: Plan, model: LoadedModel, words: Words, *, seconds: float) -> Scorer:
    """likelihood, majority, module:function, or anything with a space or slash in it: a command.

    Raises: ConfigError on the first rank when a checker cannot be imported.
    """
    if name == "likelihood":
        return Likelihood(model, words, plan)
    if name == "majority":
        return Majority(plan)
    if not model.groups.is_first_rank:
        return Outside(None)
    return Outside(CheckerScorer(name, seconds) if is_checker(name) else CommandScorer(name, seconds))


def is_checker(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), function])


def require_scorer(name: str) -> None:
    """Raises: ConfigError for a name that is none of the four, and for a command that a shell could not read."""
    require_text("--scorer", name)
    if name in ("likelihood", "majority") or is_checker(name):
        return
    why = ""
    if " " in name or "/" in name:
        try:
            if shlex.split(name):
                return
        except ValueError as error:
            why = f" ({error})"
    raise ConfigError(
        f"--scorer {name!r} is no scorer{why}.",
        "Give likelihood, majority, module:function, or a command (a path, or a program with arguments).",
    )
