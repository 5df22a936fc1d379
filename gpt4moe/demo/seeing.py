"""What `make vision` runs: a tiny model learns to see, and is examined on pictures of what it never learned.

    pictures drawn -> data/drawn, their sources data/drawn/data, the texts alone data/drawn/text
    side by side: a language model on the texts -> runs/tiny_vision-text-SEED
                  the image encoder by captions -> data/drawn/encoder-SEED
    +experiment=tiny_vision from both -> runs/tiny_vision-SEED
        -> examined seeing, with pictures shuffled, with its gates at 0 -> results.json, a table in report.html

What is there already is not made again.
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

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import committed_steps, find_checkpoint
from gpt4moe.config.load import load_run_config
from gpt4moe.data.manifest import MANIFEST_NAME, file_sha256
from gpt4moe.demo.commands import run_python, run_side_by_side
from gpt4moe.demo.pictures.items import FEW_SHOT
from gpt4moe.demo.pictures.make import ASKED, LEARNED, TEXTS, prepare_once, write_set
from gpt4moe.demo.seeing_answers import Answers
from gpt4moe.demo.seeing_exam import NO_EXAMPLE, examine, read_items
from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.pages.run_report import write_run_report
from gpt4moe.runlog.command_line import print_error
from gpt4moe.runlog.run_files import RESULTS_FILE, replace_file

EXPERIMENT = "+experiment=tiny_vision"
TEXT = (
    "+experiment=tiny", "model.vocab_size=512", "model.init_std=0.08", "model.moe.ffn_hidden_size=64",
    "data.document_mask=true", "++data.sources.captions=0.2", "++data.sources.names=0.4", "++data.sources.repeats=0.4",
    "training.steps=1000", "schedule.total_steps=1000", "optimizer.lr=1.5e-3",
    "training.global_batch_size=8", "training.micro_batch_size=8", "training.eval_every=0", "checkpoint.every=1000",
)  # fmt: skip
"""A run on the texts alone, of the language model of tiny_vision.yaml. Most of the texts are there to be copied from:
to find the word that goes with a colour is what takes long."""
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
    """Exit status: 0 done, 2 bad input."""
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
    return 0


def tell(plan: Plan, seed: int) -> dict[str, Any]:
    """All of it with one seed. Returns: what results.json gets. Raises: Gpt4MoeError."""
    console = Console(highlight=False)
    console.rule("Pictures", style="dim")
    _draw(plan, console)
    console.rule("A language model, and an image encoder", style="dim")
    base = _learn_words_and_pictures(plan, seed, console)
    console.rule("Learning to see", style="dim")
    run = _learn_to_see(plan, seed, base, console)
    console.rule("Held-out items", style="dim")
    found = examine(find_checkpoint(run), read_items(plan.drawn), run / SHEET)
    results = {
        "seed": seed,
        "kinds": {kind: {way: one.score() for way, one in ways.items()} for kind, ways in found.items()},
        "table": table_of(found),
        "sheets": {SHEET: SAID_OF_SHEET},
    }
    replace_file(run / RESULTS_FILE, (json.dumps(results, indent=1) + "\n").encode())
    report = write_run_report(run)
    head, *rows = table_of(found)
    shown = Table(*head, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(f"Results     {run / RESULTS_FILE}\nReport      {report}")
    return results


def table_of(found: Mapping[str, Mapping[str, Answers]]) -> list[list[str]]:
    """A row for each kind and for each field of its answers, after a head."""
    rows = [["right on held-out items", "number", "seen", "shuffled", "gates at 0"]]
    for kind, ways in found.items():
        scores = {way: one.score() for way, one in ways.items()}
        if kind == FEW_SHOT:
            for name, way in (("4 examples", "seen"), (NO_EXAMPLE, NO_EXAMPLE)):
                one = scores[way]
                said = f"{one['right']:.1%} ({one['low']:.0%} to {one['high']:.0%})"
                rest = [f"{scores[other]['right']:.1%}" for other in WAYS[1:]] if way == "seen" else ["", ""]
                rows.append([f"a new word for a colour, one of two: {name}", str(one["number"]), said, *rest])
            continue
        number = str(scores["seen"]["number"])
        rows.append([f"{kind}: the whole answer", number, *(f"{scores[way]['right']:.1%}" for way in WAYS)])
        for name in scores["seen"]["fields"]:
            rows.append([f"{kind}: {name}", number, *(f"{scores[way]['fields'][name]:.1%}" for way in WAYS)])
    return rows


def _draw(plan: Plan, console: Console) -> None:
    write_set(plan.drawn, learned=plan.learned, asked=plan.asked)
    prepare_once(plan.drawn, plan.drawn / "tokenizer.json")
    if not (plan.drawn / "text" / MANIFEST_NAME).is_file():
        sources = [
            word for name in TEXTS
            for word in ("--source", f"{name}={plan.drawn / name}.jsonl", "--licence", f"{name}=CC0-1.0")
        ]  # fmt: skip
        run_python(console, "tools/tokenize_corpus.py", "--tokenizer", plan.drawn / "tokenizer.json", "--out",
                   plan.drawn / "text", "--held-out", "0.05", *sources)  # fmt: skip
    console.print(f"{plan.drawn}: pictures to learn, and {plan.drawn / 'items.jsonl'} to be asked.")


def _learn_words_and_pictures(plan: Plan, seed: int, console: Console) -> Path:
    """Both at the same time, where they are not there. Returns: the language model's run."""
    encoder, logs = _encoder(plan, seed), {}
    if not encoder.exists():
        steps = () if plan.encoder_steps is None else ("--steps", str(plan.encoder_steps))
        logs[encoder.with_suffix(".log")] = ["-m", "gpt4moe.demo.contrastive", "--set", str(plan.drawn), "--out",
                                             str(encoder), "--seed", str(seed), *steps, *plan.vision]  # fmt: skip
    name = f"tiny_vision-text-{seed}"
    if plan.base is not None:
        _require_same_tokens(plan.base, plan.drawn / "tokenizer.json")
        run_side_by_side(console, logs, None)
        return plan.base
    words = _train(plan, name, seed, (*TEXT, f"data.path={plan.drawn / 'text'}", *plan.text))
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


def _learn_to_see(plan: Plan, seed: int, base: Path, console: Console) -> Path:
    name = f"tiny_vision-{seed}"
    more = (EXPERIMENT, f"data.path={plan.drawn / 'data'}", f"checkpoint.load={base}",
            f"model.vision.encoder.folder={_encoder(plan, seed)}", *plan.vision, *plan.stage)  # fmt: skip
    words = _train(plan, name, seed, more)
    if words is not None:
        ranks = ("-m", "torch.distributed.run", "--nproc-per-node", plan.processes) if plan.processes > 1 else ()
        run_python(console, *ranks, *words)
    return plan.runs / name


def _encoder(plan: Plan, seed: int) -> Path:
    return plan.drawn / f"encoder-{seed}"


def _train(plan: Plan, name: str, seed: int, overrides: tuple[str, ...]) -> list[str] | None:
    """A run, as words for Python; None: it has ended. Raises: Gpt4MoeError for what the trainer would refuse."""
    words = [*overrides, *plan.language, f"run.root={plan.runs}", f"run.name={name}", f"run.seed={seed}"]
    steps = load_run_config(words).training.steps
    has_ended = max(committed_steps(plan.runs / name / "checkpoints"), default=0) >= steps
    return None if has_ended else ["-m", "gpt4moe.train", *words]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
