"""What `make vision` runs: a tiny model learns to see, and is examined on pictures of what it never learned.

    pictures drawn -> data/drawn, their sources data/drawn/data, the texts alone data/drawn/text
    side by side: a language model on the texts -> runs/tiny_vision-text-SEED
                  the image encoder by captions -> data/drawn/encoder-SEED
    +experiment=tiny_vision from both -> runs/tiny_vision-SEED
        -> examined seeing, with pictures shuffled, with its gates at 0 -> results.json, a table in report.html

What is there already is not made again, if it was made of what is asked for (made_of.py).
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt4moe.architecture.encoder_folder import encoder_identity
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import committed_steps, find_checkpoint
from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.manifest import MANIFEST_NAME
from gpt4moe.demo.commands import run_python, run_side_by_side
from gpt4moe.demo.contrastive import Course, encoder_made_of
from gpt4moe.demo.made_of import mark_of, require_made_of
from gpt4moe.demo.pictures.items import FEW_SHOT
from gpt4moe.demo.pictures.make import ASKED, LEARNED, MADE_OF, TEXTS, prepare_once, write_set
from gpt4moe.demo.seeing_answers import Answers
from gpt4moe.demo.seeing_exam import NO_EXAMPLE, constant, examine, read_items
from gpt4moe.errors import INTERRUPTED, Gpt4MoeError, LaunchError
from gpt4moe.pages.run_report import write_run_report
from gpt4moe.runlog.command_line import print_error
from gpt4moe.runlog.run_files import RESULTS_FILE, replace_file

EXPERIMENT = "+experiment=tiny_vision"
TEXT = (
    "+experiment=tiny", "model.seq_length=128", "model.vocab_size=512", "model.init_std=0.08",
    "model.moe.ffn_hidden_size=64", "data.document_mask=true",
    "++data.sources.captions=0.2", "++data.sources.names=0.4", "++data.sources.repeats=0.4",
    "training.steps=800", "schedule.total_steps=800", "optimizer.lr=1.5e-3",
    "training.global_batch_size=16", "training.micro_batch_size=16", "training.eval_every=0", "checkpoint.every=800",
)  # fmt: skip
"""A run on the texts alone, of the language model of tiny_vision.yaml. Most of the texts are there to be copied from:
to find the word that goes with a colour is what takes long."""
_TEXT_HELD_OUT = "0.05"
SHEET = "seen.png"
SAID_OF_SHEET = (
    "Held-out pictures with answers; then each word of the answer, over what its attention to latents, and theirs to "
    "patches, came from. Of a clip the first frame and the last."
)
WAYS = ("seen", "shuffled", "closed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Folders, sizes and overrides of all of it."""

    drawn: Path = Path("data/drawn")
    runs: Path = Path("runs")
    base: Path | None = None
    """A run or step folder with a language model, in place of one of its own."""
    processes: int = 2
    """Of the stage."""
    learned: Mapping[str, int]
    asked: Mapping[str, int]
    encoder_steps: int | None = None
    language: tuple[str, ...] = ()
    """Overrides of the run on texts and of the stage."""
    vision: tuple[str, ...] = ()
    """Of the encoder and of the stage."""
    text: tuple[str, ...] = ()
    """Of the run on texts."""
    stage: tuple[str, ...] = ()
    """Of the stage."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m gpt4moe.demo.seeing", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how often all is done, each time with another seed (1)")
    parser.add_argument("--base", type=Path, help="a run with a language model of data/drawn/tokenizer.json")
    parser.add_argument("overrides", nargs="*", help="more Hydra overrides of the stage, e.g. training.steps=20")
    given = parser.parse_args(arguments)
    plan = Plan(base=given.base, learned=LEARNED, asked=ASKED, stage=tuple(given.overrides))
    try:
        for seed in range(given.seeds):
            tell(plan, seed)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("Stopped by Ctrl-C.", "The same command goes on: what is there already is not made again.")
        return INTERRUPTED
    return 0


def tell(plan: Plan, seed: int) -> dict[str, Any]:
    """All of it with one seed. Returns: what results.json gets. Raises: Gpt4MoeError."""
    console = Console(highlight=False)
    console.rule("Pictures", style="dim")
    _draw(plan, console)
    console.rule("A language model, and an image encoder", style="dim")
    base = _learn_words_and_pictures(plan, seed, console)
    console.rule("Learning to see", style="dim")
    parts = _parts(plan, seed, base)
    run = _learn_to_see(plan, seed, base, parts, console)
    console.rule("Held-out items", style="dim")
    items = read_items(plan.drawn)
    found = examine(find_checkpoint(run), items, run / SHEET)
    constants = {kind: constant([item for item in items if item.kind == kind]) for kind in found}
    results = {
        "seed": seed,
        "base": str(find_checkpoint(base)),
        **parts,
        "kinds": {kind: {way: one.score() for way, one in ways.items()} for kind, ways in found.items()},
        "constant": constants,
        "table": table_of(found, constants),
        "sheets": {SHEET: SAID_OF_SHEET},
    }
    replace_file(run / RESULTS_FILE, (json.dumps(results, indent=1) + "\n").encode())
    report = write_run_report(run)
    head, *rows = table_of(found, constants)
    shown = Table(*head, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(f"Results     {run / RESULTS_FILE}\nReport      {report}")
    return results


def table_of(found: Mapping[str, Mapping[str, Answers]], constants: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each kind and for each field of its answers, after a head.

    Args:
        constants: of each kind seeing_exam.constant.
    """
    rows = [["right on held-out items", "items", "different", "seen", "shuffled", "gates at 0", "constant"]]
    for kind, ways in found.items():
        scores = {way: one.score() for way, one in ways.items()}
        constant_answer = constants[kind]
        numbers = [str(scores["seen"]["number"]), str(constant_answer["keys"])]
        if kind == FEW_SHOT:
            for name, shown in (("4 examples", WAYS), (NO_EXAMPLE, (NO_EXAMPLE,))):
                said = [_with_interval(scores[way]) for way in shown] + [""] * (len(WAYS) - len(shown))
                rows.append([f"a colour by its new word: {name}", *numbers, *said,
                             f"{constant_answer['right']:.1%}"])  # fmt: skip
            continue
        rows.append([f"{kind}: the whole answer", *numbers, *(f"{scores[way]['right']:.1%}" for way in WAYS),
                     f"{constant_answer['right']:.1%}"])  # fmt: skip
        for name in scores["seen"]["fields"]:
            rows.append([f"{kind}: {name}", *numbers, *(f"{scores[way]['fields'][name]:.1%}" for way in WAYS),
                         f"{constant_answer['fields'][name]:.1%}"])  # fmt: skip
    return rows


def _with_interval(score: Mapping[str, Any]) -> str:
    return f"{score['right']:.1%} ({score['low']:.0%} to {score['high']:.0%})"


def _draw(plan: Plan, console: Console) -> None:
    write_set(plan.drawn, learned=plan.learned, asked=plan.asked)
    prepare_once(plan.drawn, plan.drawn / "tokenizer.json")
    text = plan.drawn / "text"
    require_made_of(text, {
        "tokenizer": file_sha256(plan.drawn / "tokenizer.json"), "held_out": _TEXT_HELD_OUT,
        "texts": {name: file_sha256(plan.drawn / f"{name}.jsonl") for name in TEXTS},
    })  # fmt: skip
    if not (text / MANIFEST_NAME).is_file():
        sources = [
            word for name in TEXTS
            for word in ("--source", f"{name}={plan.drawn / name}.jsonl", "--licence", f"{name}=CC0-1.0")
        ]  # fmt: skip
        run_python(console, "tools/tokenize_corpus.py", "--tokenizer", plan.drawn / "tokenizer.json", "--out",
                   text, "--held-out", _TEXT_HELD_OUT, *sources)  # fmt: skip
    console.print(f"{plan.drawn}: pictures to learn, and {plan.drawn / 'items.jsonl'} to be asked.")


def _learn_words_and_pictures(plan: Plan, seed: int, console: Console) -> Path:
    """Both at the same time, where they are not there. Returns: the language model's run."""
    encoder, logs = _encoder(plan, seed), {}
    course = Course(seed=seed) if plan.encoder_steps is None else Course(seed=seed, steps=plan.encoder_steps)
    vision = load_run_config([EXPERIMENT, "run.name=encoder", *plan.vision]).model.vision
    assert vision is not None
    require_made_of(encoder, encoder_made_of(plan.drawn, vision.encoder, course))
    if not encoder.exists():
        logs[encoder.with_suffix(".log")] = [
            "-m", "gpt4moe.demo.contrastive", "--set", str(plan.drawn), "--out", str(encoder), "--seed", str(seed),
            "--steps", str(course.steps), *plan.vision,
        ]  # fmt: skip
    name = f"tiny_vision-text-{seed}"
    if plan.base is not None:
        _require_same_tokens(plan.base, plan.drawn / "tokenizer.json")
        run_side_by_side(console, logs, None)
        return plan.base
    made_of = json.loads(mark_of(plan.drawn / "text").read_text())
    words = _train(plan, name, seed, (*TEXT, f"data.path={plan.drawn / 'text'}", *plan.text), {"text": made_of})
    run_side_by_side(console, logs, words)
    return plan.runs / name


def _require_same_tokens(base: Path, tokenizer: Path) -> None:
    """Raises: LaunchError."""
    step = find_checkpoint(base)
    if Manifest.load(step).identity.get("tokenizer") != file_sha256(tokenizer):
        raise LaunchError(
            f"{step} was not trained with {tokenizer}.",
            f"Give a run on texts of that tokenizer (runs/tiny_vision-text-0, of {TEXT[0]} say), or no --base.",
        )


def _parts(plan: Plan, seed: int, base: Path) -> dict[str, str]:
    """Hashes of what the stage is made of: of the base's manifest, which has those of its files; of the encoder."""
    encoder = encoder_identity(_encoder(plan, seed), lambda done, total: None)
    return {"base_sha256": file_sha256(find_checkpoint(base) / MANIFEST_NAME), "encoder_sha256": encoder["weights"]}


def _learn_to_see(plan: Plan, seed: int, base: Path, parts: Mapping[str, str], console: Console) -> Path:
    name = f"tiny_vision-{seed}"
    more = (EXPERIMENT, f"data.path={plan.drawn / 'data'}", f"checkpoint.load={base}",
            f"model.vision.encoder.folder={_encoder(plan, seed)}", *plan.vision, *plan.stage)  # fmt: skip
    made_of = {**parts, "processes": plan.processes, "data": json.loads((plan.drawn / "data" / MADE_OF).read_text())}
    words = _train(plan, name, seed, more, made_of)
    if words is not None:
        ranks = ("-m", "gpt4moe.launch_ranks", "--nproc-per-node", plan.processes) if plan.processes > 1 else ()
        run_python(console, *ranks, *words)
    return plan.runs / name


def _encoder(plan: Plan, seed: int) -> Path:
    return plan.drawn / f"encoder-{seed}"


def _train(plan: Plan, name: str, seed: int, overrides: tuple[str, ...], parts: Mapping[str, Any]) -> list[str] | None:
    """A run, as words for Python; None: it has ended.

    Args:
        parts: what it is made of beside its settings.
    Raises: Gpt4MoeError for what the trainer would refuse, and for a run that is there, made of something else.
    """
    words = [*overrides, *plan.language, f"run.root={plan.runs}", f"run.name={name}", f"run.seed={seed}"]
    run = load_run_config(words)
    require_made_of(plan.runs / name, {"settings": _settings(run), **parts})
    has_ended = max(committed_steps(plan.runs / name / "checkpoints"), default=0) >= run.training.steps
    return None if has_ended else ["-m", "gpt4moe.train", *words]


def _settings(run: RunConfig) -> dict[str, Any]:
    """All but where things lie and what is logged."""
    found = config_to_dict(run)
    del found["tracking"], found["run"]["root"], found["data"]["path"], found["checkpoint"]["load"]
    if found["model"]["vision"]:
        del found["model"]["vision"]["encoder"]["folder"]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
