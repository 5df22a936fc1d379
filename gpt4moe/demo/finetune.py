"""What `make sft` runs: the tiny model learns to answer, and is examined on questions that it never learned.

    exercises -> data/tiny_sft (tools/prepare_chat.py)
    a short run on the text of `make data`, or --base -> examined
    +experiment=tiny_sft from its weights, whole and with LoRA, side by side
        -> both examined -> results.json, a table in report.html, an export that answers

What is there already is not made again.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.load import load_run_config
from gpt4moe.data.check import check_data
from gpt4moe.data.manifest import MANIFEST_NAME
from gpt4moe.demo.commands import run_python, run_side_by_side
from gpt4moe.demo.exercises import write_exercises
from gpt4moe.errors import INTERRUPTED, Gpt4MoeError, LaunchError
from gpt4moe.pages.run_report import write_run_report
from gpt4moe.runlog.command_line import print_error
from gpt4moe.runlog.run_files import RESULTS_FILE, replace_file

OWN_BASE = "tiny-base"
_STEPS_OF_BASE = 240
BASE = (
    "+experiment=tiny", f"training.steps={_STEPS_OF_BASE}", f"schedule.total_steps={_STEPS_OF_BASE}",
    "schedule.warmup_steps=20", "training.global_batch_size=4", "training.micro_batch_size=4", "training.eval_every=0",
    f"checkpoint.every={_STEPS_OF_BASE}", "model.init_std=0.08",
)  # fmt: skip
"""LoRA leaves the output layer as it is, so its rows must tell tokens apart. A short run teaches of rare tokens little
more than that they are rare: begun at the usual 0.02, their rows stay almost alike (a norm of 0.4 of their own, of 0.7
in common), and LoRA answers nothing."""
VARIANTS: dict[str, list[str]] = {
    "full": [], "lora": ["stage.lora.rank=64", "stage.lora.alpha=256", "optimizer.lr=7.0e-4"],
}  # fmt: skip
"""Name -> overrides of +experiment=tiny_sft. The first is in results.json's own keys, the other under its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Folders, and overrides of every run."""

    runs: Path = Path("runs")
    text: Path = Path("data/demo")
    """What the tiny model is trained on; its tokenizer."""
    chat: Path = Path("data/tiny_sft")
    base: Path | None = None
    """A run or step folder to begin with, in place of a run of its own."""
    overrides: tuple[str, ...] = ()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt4moe.demo.finetune", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="a run to begin with, of the tokenizer of data/demo: runs/tiny-4")
    parser.add_argument("overrides", nargs="*", help="more Hydra overrides, e.g. training.steps=20")
    given = parser.parse_args(arguments)
    try:
        return tell(Places(base=given.base, overrides=tuple(given.overrides)))
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("Stopped by Ctrl-C.", "The same command goes on: what is there already is not made again.")
        return INTERRUPTED


def tell(places: Places) -> int:
    """All of it. Returns: 0; 1 when the model answers no better than before. Raises: Gpt4MoeError."""
    console = Console(highlight=False)
    console.rule("Exercises", style="dim")
    _make_data(places, console)
    base = _base(places, console)
    _require_same_base(places, find_checkpoint(base))
    console.rule("Fine-tuning", style="dim")
    found: dict[str, dict[str, Any]] = {"before": examine(base, places, console)}
    for name, run in _tuned(base, places, console).items():
        found[name] = examine(_merged(run, console) if name == "lora" else run, places, console)
    first = next(iter(VARIANTS))
    folder = places.runs / f"tiny_sft-{first}"
    results = {
        "exact_match_before": found["before"]["exact_match"], "exact_match_after": found[first]["exact_match"],
        "lora": {"exact_match_after": found["lora"]["exact_match"]}, "base": str(base), "table": table_of(found),
    }  # fmt: skip
    replace_file(folder / RESULTS_FILE, (json.dumps(results, indent=1) + "\n").encode())
    exported = _export(folder, console)
    report = write_run_report(folder)
    console.rule("Exact match on held-out questions", style="dim")
    head, *rows = results["table"]
    shown = Table(*head, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(f"Results     {folder / RESULTS_FILE}\nReport      {report}\nExport      {exported}")
    console.print(f'Ask it      python tools/generate.py {exported} --chat --prompt "7 + 8 = ?"')
    return int(results["exact_match_after"] <= results["exact_match_before"])


def table_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each kind of question, after a head."""
    kinds = list(found["before"]["kinds"])
    head = ["questions", "number", *found]
    rows = [
        [kind, str(found["before"]["kinds"][kind]["number"]),
         *(f"{one['kinds'][kind]['exact_match']:.1%}" for one in found.values())]
        for kind in kinds
    ]  # fmt: skip
    total = [f"{one['exact_match']:.1%}" for one in found.values()]
    return [head, *rows, ["all", str(sum(int(row[1]) for row in rows)), *total]]


def _make_data(places: Places, console: Console) -> None:
    if not (places.chat / MANIFEST_NAME).is_file():
        write_exercises(places.chat / "rows")
        rows = places.chat / "rows"
        run_python(console, "tools/prepare_chat.py", "--tokenizer", places.text / "tokenizer.json", "--out",
             places.chat,
             "--source", f"exercises={rows / 'chat.jsonl'}", "--valid", f"exercises={rows / 'held.jsonl'}",
             "--licence", "exercises=CC0-1.0")  # fmt: skip
    console.print(f"{places.chat}: exercises with answers, and {places.chat / 'rows' / 'items.jsonl'} to be asked.")


def _base(places: Places, console: Console) -> Path:
    """What the fine-tuning begins with; made here unless one is given. Raises: LaunchError for one of other tokens."""
    if places.base is not None:
        step, tokenizer = find_checkpoint(places.base), places.text / "tokenizer.json"
        if Manifest.load(step).identity.get("tokenizer") != file_sha256(tokenizer):
            raise LaunchError(
                f"{step} was not trained with {tokenizer}.",
                "Give a run on the text of `make data`, or no --base.",
            )
        return places.base
    console.rule("A short training on text", style="dim")
    words = _words(OWN_BASE, (*BASE, f"data.path={places.text}"), places)
    run_python(console, *words)
    return places.runs / OWN_BASE


def _require_same_base(places: Places, step: Path) -> None:
    """The runs go on where they are: their base must be that of the examination. Raises: LaunchError."""
    mark = places.chat / "base"
    if mark.is_file() and mark.read_text() != str(step):
        raise LaunchError(
            f"{places.runs}/tiny_sft-* were begun from {mark.read_text()}, and the newest base is {step}.",
            f"Remove {mark} and {', '.join(str(places.runs / f'tiny_sft-{name}') for name in VARIANTS)} to begin anew.",
        )
    mark.write_text(str(step))


def _tuned(base: Path, places: Places, console: Console) -> dict[str, Path]:
    """Runs of all variants, side by side: each takes one core. The first shows its progress, the others log theirs.

    Raises: LaunchError when one fails.
    """
    begin = ("+experiment=tiny_sft", f"checkpoint.load={base}", f"data.path={places.chat}")
    words = {name: _words(f"tiny_sft-{name}", (*begin, *more), places) for name, more in VARIANTS.items()}
    first, *others = words
    logs = {places.runs / f"tiny_sft-{name}.log": words[name] for name in others}
    run_side_by_side(console, logs, words[first])
    return {name: places.runs / f"tiny_sft-{name}" for name in words}


def _words(name: str, overrides: tuple[str, ...], places: Places) -> list[str]:
    """A run in one process, as words for Python. Raises: Gpt4MoeError for what the trainer would refuse."""
    words = [*overrides, f"run.root={places.runs}", f"run.name={name}", *places.overrides]
    check_data(load_run_config(words))
    return ["-m", "gpt4moe.train", *words]


def examine(model: Path, places: Places, console: Console) -> dict[str, Any]:
    """Exact match of the greedy answers to items.jsonl, whole and by kind."""
    items = [json.loads(line) for line in (places.chat / "rows" / "items.jsonl").read_text().splitlines()]
    answers = places.chat / "answers" / f"{model.parent.name}-{model.name}.jsonl"
    answers.parent.mkdir(exist_ok=True)
    answers.unlink(missing_ok=True)
    began = time.monotonic()
    run_python(
        console, "tools/evaluate.py", model, "--exact", places.chat / "rows" / "items.jsonl", "--tokenizer",
        places.chat / "tokenizer", "--tokens", "16", "--output", answers,
    )  # fmt: skip
    right = {line["id"]: line["is_right"] for line in map(json.loads, answers.read_text().splitlines())}
    kinds: dict[str, list[bool]] = {}
    for item in items:
        kinds.setdefault(item["kind"], []).append(right[item["id"]])
    console.print(f"[dim]{len(items)} questions in {time.monotonic() - began:.0f} s[/dim]")
    return {
        "exact_match": sum(right[item["id"]] for item in items) / len(items),
        "kinds": {kind: {"number": len(some), "exact_match": sum(some) / len(some)} for kind, some in kinds.items()},
    }


def _merged(run: Path, console: Console) -> Path:
    """The run's adapters and its base as one checkpoint."""
    step = find_checkpoint(run)
    out = run / "merged" / step.name
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        run_python(console, "tools/convert_checkpoint.py", "merge", step, out)
    return out


def _export(folder: Path, console: Console) -> Path:
    step = find_checkpoint(folder)
    exported = folder / "exported" / step.name
    if not exported.exists():
        exported.parent.mkdir(exist_ok=True)
        run_python(console, "tools/convert_checkpoint.py", "to-hf", step, exported, "--dtype", "fp32")
    return exported


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
