"""The command of tools/evaluate.py: arguments, checks, one rank's part of the work, what stdout gets."""

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt4moe.config.checksums import file_sha256
from gpt4moe.convert.verify import open_weights
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.manifest import MANIFEST_NAME
from gpt4moe.errors import ConfigError
from gpt4moe.evaluation import results
from gpt4moe.evaluation.corpus import SourceText, parts, read_sources, score_part
from gpt4moe.evaluation.interleaved import view_of
from gpt4moe.evaluation.questions import Examiner, Question, read_choices, read_exact
from gpt4moe.inference.command import (
    Arguments,
    add_layout,
    add_sight,
    closed_stdout,
    seen,
    wanted_parallel,
    weights_of,
    write_stdout,
)
from gpt4moe.inference.load import LoadedModel, Opened, open_folder, placed, require_placeable
from gpt4moe.inference.sight import sight_of
from gpt4moe.inference.text import Words, words_of_files
from gpt4moe.inference.writing import SharedFile
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.environment import Environment

if TYPE_CHECKING:  # it imports DeepSpeed, which looks for an accelerator then (inference.load.placed)
    from gpt4moe.inference.image_cache import LatentMaker

ROUND_QUESTIONS = 64
"""Of each copy of the model, between two appends to --output."""


def parser(description: str) -> argparse.ArgumentParser:
    out = Arguments(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="a step folder, a run folder (its latest checkpoint), a Hugging Face "
                     "folder, or one made by to-inference")  # fmt: skip
    what = out.add_argument_group("what is evaluated")
    what.add_argument("--data", type=Path, help='a data folder (its validation part), or jsonl of {"text", "source"}')
    what.add_argument("--max-tokens", type=int, help="of each source of --data, from its beginning (default: all)")
    what.add_argument("--choices", type=Path, help='jsonl of {"prompt", "choices", "answer"}, with "images"')
    what.add_argument("--exact", type=Path, help='jsonl of {"prompt" or "messages", "answer", "stop"}, with "images"')
    what.add_argument("--tokenizer", type=Path, help="folder with tokenizer and chat template (default: the model's)")
    what.add_argument("--tokens", type=int, default=64, help="of an answer to --exact at most (default 64)")
    what.add_argument("--tasks", nargs="+", default=[], help="of lm-evaluation-harness, by name")
    add_sight(what)
    what.add_argument("--include-path", type=Path, help="a folder with tasks of your own")
    what.add_argument("--limit", type=int, help="questions of each of --tasks at most (default: all)")
    shown = out.add_argument_group("results")
    shown.add_argument("--json", action="store_true", help="one JSON object, alone on stdout")
    shown.add_argument("--output", type=Path, help="jsonl of what is finished, a line each; resumed if there")
    add_layout(out)
    return out


def run(options: argparse.Namespace, environment: Environment) -> None:
    """This rank's part. Raises: Gpt4MoeError, the same on every rank."""
    _check(options)
    opened = open_folder(options.folder, open_weights)
    words = _words(opened, options.tokenizer)
    sight = sight_of(opened.run, words, options.image_token)
    sources: list[SourceText] = []
    if options.data:
        sources = read_sources(options.data, words, max_tokens=options.max_tokens, view=view_of(opened.run))
    questions: list[Question] = []
    if options.choices:
        questions += read_choices(options.choices, words, sight)
    if options.exact:
        questions += read_exact(options.exact, words, options.tokens, sight)
    images = [image.digest for question in questions for image in question.images]
    has_images = bool(images) or any(source.image_id is not None for source in sources)
    opened = seen(options, opened, has_images=has_images)
    settings = {}
    if options.output:
        settings = {**weights_of(opened, has_images=has_images), **_settings(options)}
    if options.output and images:  # without any, files of answers of earlier versions go on
        settings["images"] = hashlib.sha256(json.dumps([sight.token, *images]).encode()).hexdigest()
    parallel = wanted_parallel(options, opened, environment)
    require_placeable(replace(opened.run, parallel=parallel), environment.world_size)
    with placed(opened, parallel=parallel, environment=environment) as model:
        maker = model.latent_maker() if has_images else None
        lines = _evaluate(model, words, sources, questions, options, settings, maker)
        with raise_together(model.groups):
            if model.groups.is_first_rank:
                found = {"folder": str(options.folder), "step": model.step, **results.of_lines(lines, sources)}
                _show(json.dumps(found, ensure_ascii=False) + "\n" if options.json else results.as_text(found))


def _words(opened: Opened, folder: Path | None) -> Words:
    """The model's own, or those of a folder with tokenizer files."""
    if folder is None:
        return opened.words()
    model = opened.run.model
    return words_of_files(folder, vocab_size=model.vocab_size, context_length=model.seq_length)


def _show(text: str) -> None:
    """Raises: LaunchError when nobody reads stdout any more."""
    try:
        write_stdout(text)
    except OSError as error:
        raise closed_stdout("before the results", error) from error


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


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the lines of --output follow from beside the weights: options, and hashes of the files that they name."""
    plain = {name: getattr(options, name) for name in ("max_tokens", "tokens", "tasks", "limit")}
    files = {name: getattr(options, name) for name in ("data", "choices", "exact", "include_path", "tokenizer")}
    return plain | {name: None if path is None else _digest(path) for name, path in files.items()}


def _digest(path: Path) -> str:
    """Of a file; of a data folder's tokens, whose hashes are in its manifests; of another folder's files."""
    if path.is_file():
        return file_sha256(path)
    if (path / MANIFEST_NAME).is_file():
        return Catalogue.open([path]).fingerprint()
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    facts = [(file.relative_to(path).as_posix(), file_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _evaluate(
    model: LoadedModel, words: Words, sources: Sequence[SourceText], questions: Sequence[Question],
    options: argparse.Namespace, settings: dict[str, Any], maker: "LatentMaker | None",
) -> list[dict[str, Any]]:  # fmt: skip
    """A line for each question, part of a source and task, on rank 0; other ranks may have fewer. Collective.

    What is finished goes to --output at once; lines that are there already are taken from it.
    """
    from gpt4moe.evaluation.scoring import Scorer

    scorer = Scorer(model.chunks, model.run, model.groups, maker)
    if options.tasks:
        from gpt4moe.evaluation.harness import known_tasks, run_tasks

        known_tasks(options.tasks, options.include_path)
    texts = parts(sources)
    ids = [*(question.id for question in questions), *(part.source for part in texts), *options.tasks]
    file = SharedFile(model.groups, options.output, ids, settings)
    lines, done = file.found, file.num_done

    def keep(some: Sequence[dict[str, Any]]) -> None:
        lines.extend(some)
        file.append(some)

    examiner = Examiner(scorer, model.run, words)
    size = ROUND_QUESTIONS * scorer.num_copies
    for start in range(done, len(questions), size):
        keep(examiner.answer(questions[start : start + size]))
    for part in texts[max(done - len(questions), 0) :]:
        keep([score_part(scorer, part)])
    for task in options.tasks[max(done - len(questions) - len(texts), 0) :]:
        found = run_tasks(model, words, [task], include_path=options.include_path, limit=options.limit)
        keep([{"id": task, "kind": "task", "results": found}])
    file.close()
    return lines
