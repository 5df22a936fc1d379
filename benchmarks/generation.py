"""Generation and loading in one process, fp32 on the CPU, beside transformers on the same exported model.

    python -m benchmarks.generation              one and two threads, by the clock
    python -m benchmarks.generation --shared     on a machine that others use: one thread, CPU time

Greedy, with a cache, NEW_TOKENS after prompts of 6 to 35 tokens. transformers.generate pads the prompts to the left; it
counts with the faster of its experts implementations (eager, grouped_mm), and both with the faster number of threads,
by the median over rounds: two threads may wait for each other longer than they save. A ratio is the median over rounds
of their time over ours, with its quartiles. Both must write the same tokens. Loading is of a step folder, its blocks
checked by their hashes, beside `cp` of its files, all in the page cache, by the clock. Before each, as much memory is
touched and freed: a virtual machine's host may have taken back what is free, and would bring it again in seconds a GB,
to whichever of the two comes upon it.
Targets: 1.0 for one row, 1.2 for more; loading at half of cp's speed.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.checkpoints import SHAPE, save_checkpoint
from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine
from benchmarks.harness.timing import interleaved
from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.config.load import load_run_config
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.inference.load import LoadedModel, open_checkpoint, placed

BASE = (
    "+experiment=tiny", "run.name=benchmark", "data=mock", "model.num_layers=4", "model.num_attention_heads=8",
    "model.num_query_groups=4", "model.moe.num_experts=8", "model.vocab_size=1024", "model.seq_length=128",
)  # fmt: skip
HIDDEN_SIZES = (256, 512)
TARGETS = {1: 1.0, 8: 1.2, 32: 1.2}
"""Of each number of rows."""
LOADING_TARGET = 0.5
NEW_TOKENS, ROUNDS, THREADS = 24, 7, (1, 2)
PEERS = ("eager", "grouped_mm")


def main(arguments: list[str]) -> None:
    alone = not read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    torch.set_num_threads(max(THREADS) if alone else 1)
    print(f"Greedy generation of {NEW_TOKENS} tokens a row, fp32. {machine()}{'' if alone else ', CPU time'}")
    print(f"\n{'':20}tokens/s  transformers  ratio (quartiles)")
    with tempfile.TemporaryDirectory() as folder:
        for hidden_size in HIDDEN_SIZES:
            overrides = [*BASE, f"model.hidden_size={hidden_size}", f"model.moe.ffn_hidden_size={2 * hidden_size}"]
            step_folder = made(Path(folder) / str(hidden_size), overrides)
            with pair(step_folder) as models:
                for rows in TARGETS:
                    _report(models, hidden_size, rows, alone=alone)
        _report_loading(made(Path(folder) / "large", [*SHAPE, "model.num_layers=2"]))


def made(folder: Path, overrides: Sequence[str]) -> Path:
    """A step folder with random weights, in `folder`."""
    run = load_run_config(list(overrides))
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.ones(shape) if len(shape) == 1 else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in logical_shapes(run.model).items()
    }
    folder.mkdir()
    save_checkpoint(folder / "step-00000001", run, state)
    return folder / "step-00000001"


@dataclass(frozen=True, slots=True)
class Pair:
    """Ours and transformers' model of the same weights."""

    ours: LoadedModel
    theirs: Any


@contextmanager
def pair(step_folder: Path) -> Iterator[Pair]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    to_huggingface(step_folder, step_folder.parent / "hf", dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(step_folder.parent / "hf", dtype=torch.float32).eval()
    with placed(open_checkpoint(step_folder)) as ours:
        yield Pair(ours, theirs)


def contenders(models: Pair, rows: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Each writes the texts of the same prompts; "gpt4moe" and PEERS."""
    from gpt4moe.inference.generation import Generator
    from gpt4moe.inference.requests import Request
    from gpt4moe.inference.sampling import Sampling

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(6, 36, (rows,), generator=generator).tolist()
    prompts = [torch.randint(1, 1000, (length,), generator=generator).tolist() for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    requests = [Request(prompt=prompt, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=0)) for prompt in prompts]
    ours = Generator(models.ours.chunks, models.ours.run, models.ours.groups)

    def by_transformers(experts: str) -> list[list[int]]:
        models.theirs.set_experts_implementation(experts)
        found = models.theirs.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        texts: list[list[int]] = found[:, width:].tolist()
        return texts

    def by_gpt4moe() -> list[list[int]]:
        return [text.tokens for text in ours.generate_all(requests)]

    return {"gpt4moe": by_gpt4moe} | {experts: partial(by_transformers, experts) for experts in PEERS}


def _report(models: Pair, hidden_size: int, rows: int, *, alone: bool) -> None:
    run = contenders(models, rows)
    assert run["gpt4moe"]() == run["eager"](), "the texts differ"
    counts = THREADS if alone else (1,)
    timed = {(name, count): partial(_on_threads, count, work) for name, work in run.items() for count in counts}
    seconds = interleaved(timed, ROUNDS, warmup=1, alone=alone)
    torch.set_num_threads(max(counts))
    ours, theirs = (
        min((seconds[name, count] for name in names for count in counts), key=median) for names in (("gpt4moe",), PEERS)
    )
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    rate, their_rate = (rows * NEW_TOKENS / median(times) for times in (ours, theirs))
    print(
        f"hidden {hidden_size}, rows {rows:<4}{rate:10.0f}{their_rate:14.0f}"
        f"   {middle:.2f} ({low:.2f} to {high:.2f})   at least {TARGETS[rows]:.1f}: {_verdict(middle, TARGETS[rows])}",
        flush=True,
    )


def _on_threads(count: int, work: Callable[[], list[list[int]]]) -> list[list[int]]:
    torch.set_num_threads(count)
    return work()


def _report_loading(step_folder: Path) -> None:
    files, copy = sorted(step_folder.iterdir()), step_folder.parent / "copy"
    size = 4 * sum(map(prod, logical_shapes(open_checkpoint(step_folder).run.model).values()))

    def load() -> None:
        with placed(open_checkpoint(step_folder)):
            pass

    def cp() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        subprocess.run(["cp", "--reflink=never", *files, copy], check=True)

    seconds = interleaved({"load": load, "cp": cp}, ROUNDS, warmup=1, before=lambda: torch.ones(size // 4))
    found = median(theirs / ours for ours, theirs in zip(seconds["load"], seconds["cp"], strict=True))
    rates = " against cp's ".join(f"{size / median(times) / 1e9:.2f} GB/s" for times in seconds.values())
    verdict = f"at least {LOADING_TARGET}: {_verdict(found, LOADING_TARGET)}"
    print(f"loading {size / 1e9:.2f} GB: {rates}, ratio {found:.2f}   {verdict}")


def _verdict(found: float, target: float) -> str:
    return "reached" if found >= target else "NOT reached"


if __name__ == "__main__":
    main(sys.argv[1:])
