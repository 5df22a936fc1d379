"""What a finished demo run becomes: a folder in Hugging Face format, checked, and the text that it writes.

    to-hf  ->  strict load in transformers, every weight and the logits against the checkpoint  ->  samples from it

Each step is one of the tools, in a process of its own, as a person would call it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.errors import ConversionError
from gpt4moe.pages.report import Sample

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
    differ = [len(answer[key]) for key in ("different", "other_shape", "only_in_a", "only_in_b", "settings", "copies")]
    console.print(
        "Loaded by transformers: nothing missing, unexpected or mismatched.\n"
        f"Weights: {sum(differ)} of {answer['compared']} tensors differ. "
        f"Logits of {logits['prompts']} prompts: at most {logits['max_abs']:.1e} apart "
        f"(allowed {logits['tolerance']:g})."
    )
    return exported, not (sum(differ) or logits["different"])


def exported_samples(exported: Path, console: Console) -> list[Sample]:
    """Text that transformers writes from the exported folder."""
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    samples = _tool(console, "generate.py", exported, *prompts, "--tokens", "48", "--json")
    return [Sample(**sample) for sample in samples]


def _tool(console: Console, name: str, *arguments: object) -> Any:
    """The JSON answer of a tool; its command is shown. A comparison that found a difference exits 1 and answers too."""
    shown = " ".join(repr(text) if " " in text else text for text in map(str, arguments) if text != "--json")
    console.print(f"[dim]$ python tools/{name} {shown}[/dim]", soft_wrap=True)
    command = [sys.executable, str(_TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        raise ConversionError(f"tools/{name} ended with status {done.returncode}.", "Its own words are above.")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ConversionError(f"tools/{name} gave no answer.", "Its own words are above.") from error
