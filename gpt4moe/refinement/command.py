"""The command of tools/refine.py: arguments, rounds on all ranks of a launch, the files of --output.

trace.jsonl   every candidate (trace.py)     best.jsonl   the best text of each task     rounds.html   page.py
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed

from gpt4moe.convert.verify import open_weights
from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.inference.command import (
    Arguments,
    add_layout,
    add_limits,
    add_sampling,
    closed_stdout,
    require_positive,
    wanted_limits,
    wanted_parallel,
    wanted_sampling,
    weights_of,
    write_stdout,
)
from gpt4moe.inference.load import LoadedModel, open_folder, placed, require_placeable
from gpt4moe.inference.requests import Limits
from gpt4moe.inference.sight import sight_of
from gpt4moe.inference.text import Words
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import TIMEOUT
from gpt4moe.refinement.page import write_rounds_page
from gpt4moe.refinement.scorers import make_scorer, require_scorer
from gpt4moe.refinement.search import METHODS, Course, Drawn, Plan, Scorer, draw, keep, pieces, require_prompts
from gpt4moe.refinement.summary import summary
from gpt4moe.refinement.tasks import DEFAULT_TEMPLATE, FIRST_TEMPLATE, Task, read_tasks, require_template, require_text
from gpt4moe.refinement.trace import Trace, courses_of, settings_of
from gpt4moe.runlog.run_files import replace_file

MOST_SECONDS = 86_400
"""Of a score: a day."""


def parser(description: str) -> argparse.ArgumentParser:
    out = Arguments(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="as of tools/generate.py: a run, a step, a Hugging Face folder, ...")
    out.add_argument("--input", type=Path, required=True, help='jsonl of {"id", "prompt"}, more fields for the scorer')
    out.add_argument("--output", type=Path, required=True, help="a folder for the trace and the page; resumed if there")
    search = out.add_argument_group("search")
    search.add_argument("--method", choices=METHODS, default="refine", help="default refine")
    search.add_argument("--rounds", type=int, default=16, help="candidates of each task (default 16)")
    search.add_argument("--scorer", default="likelihood", help="likelihood (default), majority, module:function, or a "
                        "command that reads JSON and prints a number")  # fmt: skip
    search.add_argument("--scorer-seconds", type=float, default=30.0, help="time limit of a score (default 30)")
    search.add_argument("--template", default=DEFAULT_TEMPLATE, help="what a candidate is drawn from, with {task}, "
                        f"{{best}}, {{score}}, {{round}} (default {DEFAULT_TEMPLATE!r})")  # fmt: skip
    search.add_argument("--first-template", default=FIRST_TEMPLATE, help="for the first round (default {task})")
    search.add_argument("--answer", metavar="REGEX", help="finds the answer in a text (default: all of it, stripped)")
    search.add_argument("--chat", action="store_true", help="a prompt is what a user says, put into the chat template")
    add_sampling(out)
    add_limits(add_layout(out))
    return out


def run(options: argparse.Namespace, environment: Environment) -> None:
    """This rank's part. Raises: Gpt4MoeError, the same on every rank."""
    plan = _plan(options)
    tasks = read_tasks(options.input)
    opened = open_folder(options.folder, open_weights)
    words = opened.words()
    require_prompts(tasks, plan, words)
    parallel = wanted_parallel(options, opened, environment)
    require_placeable(replace(opened.run, parallel=parallel), environment.world_size)
    # The other ranks wait in a collective while the first one waits for a scorer.
    timeout = TIMEOUT + timedelta(seconds=options.scorer_seconds)
    with placed(opened, parallel=parallel, environment=environment, timeout=timeout) as model:
        settings = settings_of(plan, tasks, options.scorer, weights_of(opened))
        courses = _search(model, words, tasks, plan, options, settings)
        with raise_together(model.groups):
            if model.groups.is_first_rank:
                _write(options.output, courses, plan, options.scorer)


def _plan(options: argparse.Namespace) -> Plan:
    require_positive(options, "tokens", "rounds", "max_rows")
    if not 0 < options.scorer_seconds <= MOST_SECONDS:
        raise ConfigError(
            f"--scorer-seconds {options.scorer_seconds:g} is no time.", f"Set more than 0, at most {MOST_SECONDS}."
        )
    for option, texts in {"--answer": [options.answer or ""], "--stop": options.stop}.items():
        for text in texts:
            require_text(option, text)
    scorer = "majority" if options.method == "self-consistency" else options.scorer
    if scorer != options.scorer and options.scorer != "likelihood":
        raise ConfigError(
            f"--method self-consistency takes the majority, so --scorer {options.scorer} would have no effect.",
            "Leave --scorer out, or use --method best-of-n.",
        )
    options.scorer = scorer
    require_scorer(options.scorer)
    require_template("--first-template", options.first_template, "task")
    require_template("--template", options.template, "best")
    try:
        re.compile(options.answer or "")
    except re.error as error:
        raise ConfigError(f"--answer {options.answer!r} is no regular expression ({error}).", "Mend it.") from error
    return Plan(
        method=options.method, rounds=options.rounds, max_tokens=options.tokens, sampling=wanted_sampling(options),
        stops=tuple(options.stop), first_template=options.first_template,
        template=options.template, is_chat=options.chat, answer_pattern=options.answer,
    )  # fmt: skip


def _search(
    model: LoadedModel, words: Words, tasks: Sequence[Task], plan: Plan, options: argparse.Namespace,
    settings: dict[str, Any],
) -> list[Course]:  # fmt: skip
    """Every task with all its candidates, on every rank. Collective."""
    trace: Trace | None = None
    with raise_together(model.groups):
        if model.groups.is_first_rank:
            trace = _open(options.output, tasks, plan, settings)
    shared: list[Any] = [trace.candidates if trace else None]
    distributed.broadcast_object_list(shared, src=0, device=model.groups.device)
    courses = courses_of(tasks, shared[0])
    start = len(shared[0])
    scorer: Scorer | None = None
    with raise_together(model.groups):
        scorer = make_scorer(options.scorer, plan, model, words, seconds=options.scorer_seconds)
    assert scorer is not None
    try:
        _rounds(model, words, courses, plan, scorer, trace, start, wanted_limits(options))
    finally:
        scorer.close()
        if trace is not None:
            trace.close()
    return courses


def _open(folder: Path, tasks: Sequence[Task], plan: Plan, settings: dict[str, Any]) -> Trace:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be made: {error.strerror}.", "Give another --output.") from error
    return Trace(folder / "trace.jsonl", tasks, plan.rounds, settings)


def _rounds(
    model: LoadedModel, words: Words, courses: list[Course], plan: Plan, scorer: Scorer, trace: Trace | None,
    start: int, limits: Limits,
) -> None:  # fmt: skip
    """Adds what candidates are missing. Collective."""
    # Imported here: it imports DeepSpeed, which looks for an accelerator then (inference.load.placed).
    from gpt4moe.inference.generation import Generator

    generator = Generator(model.chunks, model.run, model.groups, limits=limits)
    banned = sight_of(model.run, words, None).banned
    columns = (TextColumn("candidates"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not model.groups.is_first_rank) as progress:
        bar = progress.add_task("", total=len(courses) * plan.rounds, completed=start)
        # The rows of each copy change twice, so that short texts make room for others.
        for some in pieces(courses, start, plan.rounds, 2 * limits.max_rows * generator.num_copies):
            drawn = draw(some, plan, words, generator.generate_all, banned=banned)
            scorer.prepare(drawn)
            _score(model, drawn, plan, scorer, trace)
            progress.update(bar, advance=len(some))


def _score(model: LoadedModel, drawn: Sequence[Drawn], plan: Plan, scorer: Scorer, trace: Trace | None) -> None:
    """Scores texts on the first rank and keeps them on every rank, which wait for one text at a time. Collective."""
    for one in drawn:
        score = torch.zeros(1, dtype=torch.float64, device=model.groups.device)
        with raise_together(model.groups):
            if trace is not None:
                score[0] = scorer.score(one)
                trace.append(one.course, keep(one, float(score), plan))
        distributed.broadcast(score, src=0)
        if trace is None:
            keep(one, float(score), plan)


def _write(folder: Path, courses: Sequence[Course], plan: Plan, scorer: str) -> None:
    lines = [
        json.dumps({"id": one.task.id, "text": one.best.text, "answer": one.best.answer, "score": one.best.score,
                    "round": one.best.round}, ensure_ascii=False) + "\n"
        for one in courses
    ]  # fmt: skip
    try:
        replace_file(folder / "best.jsonl", "".join(lines).encode())
        write_rounds_page(folder / "rounds.html", courses, plan, scorer)
    except OSError as error:
        raise LaunchError(
            f"{error.filename2 or error.filename} cannot be written: {error.strerror}.",
            "Mend the folder and give the same command again: the trace has all candidates.",
        ) from error
    try:
        write_stdout(f"{summary(courses, plan, scorer)}\n{folder / 'rounds.html'}\n")
    except OSError as error:
        raise closed_stdout(f"before the summary; the files in {folder} are written", error) from error
