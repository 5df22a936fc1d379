"""The end of `make train`: how the run went, on the console and in report.html.

    held-out loss against the corpus's entropies, load of each expert
    to-hf  ->  strict load in transformers, every weight and the logits compared with the checkpoint  ->  samples

Conversion and generation are the tools, each in a process of its own, as a person would call them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import check_data
from gpt4moe.demo.entropy import corpus_entropies
from gpt4moe.errors import ConversionError
from gpt4moe.pages.report import Sample
from gpt4moe.pages.run_report import write_run_report
from gpt4moe.runlog.console import clock_time, short_count
from gpt4moe.runlog.expert_load import ExpertLoad
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics
from gpt4moe.runlog.run_files import EXPERT_LOAD_FILE


def print_summary(folder: Path, run: RunConfig, console: Console) -> int:
    """Prints the summary, exports the model, and writes report.html again with samples from the export.

    Returns: the exit status: 1 when the held-out loss is not below the unigram entropy, an expert is dead, or the
    export is not the model that was trained.
    """
    checked = check_data(run)
    assert checked.catalogue is not None
    entropies = corpus_entropies(checked.catalogue, checked.phases)
    records = read_metrics(folder / METRICS_FILE)
    held_out = next(float(record["eval_loss"]) for record in reversed(records) if "eval_loss" in record)
    dead = _print_load(folder, console)
    console.rule("Held-out text", style="dim")
    console.print(_loss_table(held_out, entropies.unigram, entropies.bigram))
    exported, is_same = export_and_compare(folder, console)
    console.rule("Samples, written by the export", style="dim")
    samples = exported_samples(exported, console)
    for sample in samples:
        console.print(f"[bold]{escape(sample.prompt)}[/bold]{escape(sample.text)}\n")
    levels = {"unigram": entropies.unigram, "bigram": entropies.bigram}
    report = write_run_report(folder, samples=samples, entropies=levels)
    seconds = sum(float(record["step_seconds"]) for record in records)
    tokens = int(records[-1]["consumed_tokens"])
    console.rule("Done", style="dim")
    console.print(f"{len(records)} steps, {short_count(tokens)} tokens in {clock_time(seconds)} of training.")
    console.print(f"Checkpoint  {sorted((folder / 'checkpoints').glob('step-*'))[-1]}")
    console.print(f"Export      {exported}")
    console.print(f"Loss plot   {folder / 'loss.png'}")
    console.print(f"Report      {report}")
    return int(held_out >= entropies.unigram or dead > 0 or not is_same)


def _loss_table(held_out: float, unigram: float, bigram: float) -> Table:
    table = Table("", "nats/token", "what it is", box=None, padding=(0, 2, 0, 0))
    rows = sorted(
        [
            ("unigram entropy", unigram, "guessing by how frequent each token is"),
            ("bigram entropy", bigram, "guessing from the one token before, counted over the whole corpus"),
            ("this model", held_out, "loss on text it was not trained on"),
        ],
        key=lambda row: -row[1],
    )
    for name, value, meaning in rows:
        style = "bold green" if name == "this model" else None
        table.add_row(name, f"{value:.3f}", meaning, style=style)
    return table


def _print_load(folder: Path, console: Console) -> int:
    """The share of each expert in every layer, an even share being 1.0; returns the number of dead experts."""
    stored = json.loads((folder / EXPERT_LOAD_FILE).read_text())
    load = ExpertLoad(layers=stored["layers"], tokens=stored["tokens"])
    console.rule("Load per expert (1.0 is an even share)", style="dim")
    table = Table("layer", *(str(expert) for expert in range(len(load.tokens[0]))), box=None, padding=(0, 1, 0, 0))
    for layer, row in zip(load.layers, load.ratios(), strict=True):
        table.add_row(str(layer), *(f"{value:.1f}" for value in row))
    console.print(table)
    dead = load.dead_experts()
    console.print(f"Steps {stored['first_step']} to {stored['last_step']}: {len(dead)} dead experts.")
    return len(dead)


PROMPTS = ("def __init__(self, ", "import os\n", "The function returns ")
_TOOLS = Path(__file__).resolve().parents[2] / "tools"


def export_and_compare(folder: Path, console: Console) -> tuple[Path, bool]:
    """Exports the run's latest checkpoint (unless that is done already) and compares the export with it.

    Returns: the exported folder, and whether it holds the same weights and gives the same logits.
    """
    step = find_checkpoint(folder)
    exported = folder / "exported" / step.name
    console.rule("Export to Hugging Face format", style="dim")
    if not exported.exists():
        exported.parent.mkdir(exist_ok=True)
        answer = _tool(console, "convert_checkpoint.py", "to-hf", step, exported, "--dtype", "fp32", "--json")
        console.print(f"{answer['architecture']}, {answer['size_bytes'] / 1e6:.1f} MB, {answer['seconds']:.1f} s")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
        prompts.write("\n".join(prompt.strip() for prompt in PROMPTS))
        prompts.flush()
        answer = _tool(
            console, "convert_checkpoint.py", "verify", step, exported, "--prompts", prompts.name, "--json"
        )  # fmt: skip
    logits = answer["logits"]
    differ = [
        len(answer[key])
        for key in ("different", "other_shape", "only_in_a", "only_in_b", "settings", "copies", "changed_files")
    ]
    console.print(
        "Loaded by transformers: nothing missing, unexpected or mismatched.\n"
        f"Weights: {sum(differ)} of {answer['compared']} tensors differ. "
        f"Logits of {logits['prompts']} prompts: at most {logits['max_abs']:.1e} apart "
        f"(allowed {logits['tolerance']:g})."
    )
    return exported, not (sum(differ) or logits["different"])


def exported_samples(exported: Path, console: Console) -> list[Sample]:
    """Text written from the exported folder."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    samples = _tool(console, "generate.py", exported, *prompts, "--tokens", "48", "--json")
    return [Sample(prompt=sample["prompt"], text=sample["text"]) for sample in samples]


def _tool(console: Console, name: str, *arguments: object) -> Any:
    """Runs a tool, shows its command, and returns its JSON answer. Exit status 1, a difference, is an answer too."""
    shown = " ".join(repr(text) if " " in text else text for text in map(str, arguments) if text != "--json")
    console.print(f"[dim]$ python tools/{name} {shown}[/dim]", soft_wrap=True)
    command = [sys.executable, str(_TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        raise ConversionError(f"tools/{name} ended with status {done.returncode}.", "Its messages are above.")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ConversionError(f"tools/{name} gave no answer.", "Its messages are above.") from error
