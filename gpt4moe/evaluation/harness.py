"""lm-evaluation-harness on our layouts: the model `gpt4moe`. The only file that imports lm_eval.

    python tools/evaluate.py FOLDER --tasks NAME ...                              a model that is loaded already
    python -m gpt4moe.evaluation.harness run --model gpt4moe --model_args folder=FOLDER,tp=2 --tasks NAME ...

Under a launcher every rank runs the harness on the same tasks, and asks the model the same in the same order. Each
answer is computed by all ranks together, so to the harness this is one process (rank 0 of 1) everywhere.
"""

import atexit
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.convert.verify import open_weights
from gpt4moe.errors import ConfigError, Gpt4MoeError
from gpt4moe.evaluation.pieces import answer_piece, encode_text, first_token, windows
from gpt4moe.evaluation.questions import greedy_request
from gpt4moe.inference.load import LoadedModel, open_folder, placed
from gpt4moe.inference.sight import sight_of
from gpt4moe.inference.text import Words
from gpt4moe.parallel.environment import Environment
from gpt4moe.runlog.command_line import print_error

MOST_NEW_TOKENS = 256
"""Where a task sets no limit, as the harness's own models."""


@register_model("gpt4moe")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A folder's model, on any layout, as the harness asks it.

    Args:
        folder: loads the model onto the layout tp x pp x ep x etp of this launch, until this process ends.
        loaded: (model, words) that is loaded already, instead of `folder`.
        batch_size, max_batch_size, device: the harness gives them to every model; how much fits a pass is ours to know.
    """

    def __init__(
        self, folder: str | None = None, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, *,
        loaded: tuple[LoadedModel, Words] | None = None, batch_size: Any = None, max_batch_size: Any = None,
        device: Any = None,
    ):  # fmt: skip
        super().__init__()
        if loaded is None:
            loaded = _load(folder, ParallelConfig(tp=int(tp), pp=int(pp), ep=int(ep), etp=int(etp)))
        # Imported here: they import DeepSpeed, which looks for an accelerator then (inference.load.placed).
        from gpt4moe.evaluation.scoring import Scorer
        from gpt4moe.inference.generation import Generator

        model, self.words = loaded
        self.banned = sight_of(model.run, self.words, None).banned
        self.encode = partial(encode_text, self.words, has_special=True)
        self.scorer = Scorer(model.chunks, model.run, model.groups)
        self.generator = Generator(model.chunks, model.run, model.groups)

    @property
    def eot_token_id(self) -> int:
        return min(self.words.end_ids) if self.words.end_ids else first_token(self.words)

    @property
    def prefix_token_id(self) -> int:
        return first_token(self.words)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **rest: Any) -> list[int]:
        return self.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **rest: Any
    ) -> list[tuple[float, bool]]:
        pieces = [answer_piece(before, after, self.words.context_length) for _, before, after in requests]
        return [(score.total, bool(score.is_greedy.all())) for score in self.scorer.score(pieces)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        before = first_token(self.words)
        texts = [
            list(windows([before, *self.encode(request.args[0])], self.words.context_length)) for request in requests
        ]
        scores = iter(self.scorer.score([piece for pieces in texts for piece in pieces]))
        return [sum(next(scores).total for _ in pieces) for pieces in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        end = self.words.decode([self.eot_token_id])
        wanted, stops = [], []
        for prompt, settings in (request.args for request in requests):
            kwargs = normalize_gen_kwargs(settings, MOST_NEW_TOKENS)
            if kwargs["do_sample"]:
                raise ConfigError("The task draws texts (do_sample), but the model gpt4moe answers greedily.",
                                  "Set generation_kwargs.do_sample: false in the task.")  # fmt: skip
            stop, most = handle_stop_sequences(kwargs["until"], eos=end), kwargs["max_gen_toks"]
            room = self.words.context_length - most
            if room < 1:
                raise ConfigError(
                    f"The task asks for {most} new tokens, the context takes {self.words.context_length} in all.",
                    f"Set generation_kwargs.max_gen_toks to {self.words.context_length - 1} or less in the task.",
                )
            tokens = (self.encode(prompt) or [first_token(self.words)])[-room:]
            wanted.append(greedy_request(self.words, tokens, most, stop, self.banned))
            stops.append(stop)
        texts = self.generator.generate_all(wanted)
        return [
            postprocess_generated_text(self.words.decode(text.tokens), stop=stop, think_end_token=None)
            for text, stop in zip(texts, stops, strict=True)
        ]


def known_tasks(tasks: list[str], include_path: Path | None) -> TaskManager:
    """Raises: ConfigError for a task that is not there."""
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness has no task {unknown[0]!r}.",
            "Name one that `lm_eval ls tasks` lists, or give --include-path (training.evaluate_include_path) with the "
            "folder of your own.",
        )
    return manager


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """Tasks with their data, ready to be asked more than once."""

    manager: TaskManager
    parts: list[Any]
    """Tasks and groups of lm_eval."""


def load_tasks(tasks: list[str], include_path: Path | None) -> LoadedTasks:
    """Raises: ConfigError for a task that is not there, and for one whose data cannot be had."""
    manager = known_tasks(tasks, include_path)
    parts: list[Any] = []
    for name in tasks:
        try:
            loaded = manager.load([name])
        except Exception as error:  # a data set raises what it likes
            why = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"lm-evaluation-harness cannot load task {name!r}: {type(error).__name__}: {why}.",
                "Load its data once where there is a network, or leave the task out.",
            ) from error
        one = loaded["groups"].get(name) or loaded["tasks"].get(name)
        parts += loaded["tasks"].values() if one is None else [one]  # a tag has tasks alone
    return LoadedTasks(manager, parts)


def run_tasks(
    model: LoadedModel, words: Words, tasks: list[str], *, include_path: Path | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """run_loaded of tasks by name. Raises: ConfigError, as load_tasks."""
    return run_loaded(model, words, load_tasks(tasks, include_path), limit=limit)


def run_loaded(model: LoadedModel, words: Words, tasks: LoadedTasks, *, limit: int | None) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, on rank 0; on others maybe none. Collective over the world."""
    with _random_numbers_kept():
        found = lm_eval.simple_evaluate(
            HarnessModel(loaded=(model, words)), tasks=tasks.parts, task_manager=tasks.manager, limit=limit,
            bootstrap_iters=0,
        )  # fmt: skip
    # The harness gives no results where LOCAL_RANK is set and above 0.
    return {} if found is None else {task: dict(values) for task, values in found["results"].items()}


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """The harness seeds Python's, numpy's and torch's generators; a run that trains goes on with its own."""
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(of_numpy)


def _load(folder: str | None, parallel: ParallelConfig) -> tuple[LoadedModel, Words]:
    if folder is None:
        raise ConfigError("The model gpt4moe needs a folder.", "Give --model_args folder=FOLDER.")
    opened = open_folder(Path(folder), open_weights)
    words = opened.words()
    parallel.validate()
    stack = ExitStack()
    model = stack.enter_context(placed(opened, parallel=parallel, environment=Environment.detect()))
    atexit.register(stack.close)
    return model, words


def main() -> int:
    """The harness's own command. Returns: the exit status; what is wrong with the folder or layout is 2, told once."""
    from lm_eval.__main__ import cli_evaluate

    environment = None
    try:
        environment = Environment.detect()
        cli_evaluate()
    except Gpt4MoeError as error:
        if environment is None or environment.rank == error.told_by:
            print_error(error.cause, error.cure)
        if environment is not None:
            environment.refuse_together(error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
