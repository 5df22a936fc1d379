"""The command of tools/evaluate.py: arguments, checks, one rank's part of the work, what stdout gets."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt4moe.convert.verify import open_weights
from gpt4moe.errors import ConfigError
from gpt4moe.evaluation import results
from gpt4moe.evaluation.corpus import SourceText, evaluate_sources, read_sources
from gpt4moe.evaluation.questions import Examiner, Question, read_choices, read_exact
from gpt4moe.inference.command import add_layout, closed_stdout, wanted_parallel
from gpt4moe.inference.files import AnswerFile
from gpt4moe.inference.load import LoadedModel, open_folder, placed, require_placeable
from gpt4moe.inference.text import Words
from gpt4moe.parallel.agreement import broadcast_int, raise_together
from gpt4moe.parallel.environment import Environment

ROUND_QUESTIONS = 64
"""Of each copy of the model, between two appends to --output."""


def parser(description: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="a step folder, a run folder (its latest checkpoint), a Hugging Face "
                     "folder, or one made by to-inference")  # fmt: skip
    what = out.add_argument_group("what is evaluated")
    what.add_argument("--data", type=Path, help='a data folder (its validation part), or jsonl of {"text", "source"}')
    what.add_argument("--max-tokens", type=int, help="of each source of --data, from its beginning (default: all)")
    what.add_argument("--choices", type=Path, help='jsonl of {"prompt", "choices", "answer"}')
    what.add_argument("--exact", type=Path, help='jsonl of {"prompt", "answer", "stop"}')
    what.add_argument("--tokens", type=int, default=64, help="of an answer to --exact at most (default 64)")
    what.add_argument("--tasks", nargs="+", default=[], help="of lm-evaluation-harness, by name")
    what.add_argument("--include-path", type=Path, help="a folder with tasks of your own")
    what.add_argument("--limit", type=int, help="questions of each of --tasks at most (default: all)")
    shown = out.add_argument_group("results")
    shown.add_argument("--json", action="store_true", help="one JSON object, alone on stdout")
    shown.add_argument("--output", type=Path, help="jsonl of the answers to --choices and --exact; resumed if there")
    add_layout(out)
    return out


def run(options: argparse.Namespace, environment: Environment) -> None:
    """This rank's part. Raises: Gpt4MoeError, the same on every rank."""
    _check(options)
    opened = open_folder(options.folder, open_weights)
    words = opened.words()
    sources = read_sources(options.data, words, max_tokens=options.max_tokens) if options.data else []
    questions: list[Question] = []
    if options.choices:
        questions += read_choices(options.choices, words)
    if options.exact:
        questions += read_exact(options.exact, words, options.tokens)
    parallel = wanted_parallel(options, opened, environment)
    require_placeable(replace(opened.run, parallel=parallel), environment.world_size)
    with placed(opened, parallel=parallel, environment=environment) as model:
        found = _evaluate(model, words, sources, questions, options)
        if model.groups.is_first_rank:
            _show(json.dumps(found, ensure_ascii=False) + "\n" if options.json else results.as_text(found))


def _show(text: str) -> None:
    """Raises: LaunchError when nobody reads stdout any more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise closed_stdout("before the results") from error


def _check(options: argparse.Namespace) -> None:
    if not (options.data or options.choices or options.exact or options.tasks):
        raise ConfigError("Nothing to evaluate.", "Give --data, --choices, --exact or --tasks.")
    for name in ("max_tokens", "tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is below 1.", "Set 1 or more.")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks are of lm-evaluation-harness, which is not installed.",
            "Install it: pip install lm-eval==0.4.13 -c constraints.txt",
        )
    if options.output and not (options.choices or options.exact):
        raise ConfigError("--output holds answers, but there are no questions.", "Give --choices or --exact too.")


def _evaluate(
    model: LoadedModel, words: Words, sources: Sequence[SourceText], questions: Sequence[Question],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is asked for, on rank 0; other ranks may know less of it. Collective."""
    from gpt4moe.evaluation.scoring import Scorer

    scorer = Scorer(model.chunks, model.run, model.groups)
    found: dict[str, Any] = {"folder": str(options.folder), "step": model.step}
    if sources:
        found["sources"] = [source.facts() for source in evaluate_sources(scorer, sources)]
    if questions:
        found |= results.of_answers(_answers(Examiner(scorer, model.run, words), model, questions, options.output))
    if options.tasks:
        from gpt4moe.evaluation.harness import run_tasks

        found["tasks"] = run_tasks(model, words, options.tasks, include_path=options.include_path, limit=options.limit)
    return found


def _answers(
    examiner: Examiner, model: LoadedModel, questions: Sequence[Question], output: Path | None
) -> list[dict[str, Any]]:
    """All answers, on rank 0; those that `output` has already are read from it. Collective."""
    file, found = None, []
    with raise_together(model.groups):
        if output is not None and model.groups.is_first_rank:
            file = AnswerFile(output, [question.id for question in questions])
            found = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[: file.num_done]]
    done = broadcast_int(len(found), model.groups)
    size = ROUND_QUESTIONS * examiner.scorer.num_copies
    for start in range(done, len(questions), size):
        some = examiner.answer(questions[start : start + size])
        found += some
        with raise_together(model.groups):
            if file is not None:
                file.append(some)
    if file is not None:
        file.close()
    return found
