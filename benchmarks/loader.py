"""Processor time of the loader, from sample numbers to micro-batches, beside Megatron-core's GPTDataset on its files.

    python -m benchmarks.loader

Both read 64 samples a step in an order of their own and give tokens, labels, positions and loss mask, int64 and fp32.
gpt4moe adds the tokens' numbers in the run, the sources, and the check that every token is in the vocabulary; with
documents, the document of each token. Megatron's samples go through torch's default_collate in this process: worker
processes would add the cost of moving them. No side makes an attention mask. All files are in the page cache, and
Megatron's indexes are built before. "First pass" is a launch whose blocks are all checked against their sums, which
Megatron does not do. "Apart": positions and losses end with documents. gpt4moe is listed twice: how far the two are
apart is noise. Targets: 20M tokens/s, and at least 1.0 of Megatron in every row. The last line trains `tiny` as shipped
and makes its micro-batches, each in processor time of one thread. Target: 20 times what tiny eats, also if all cores of
the machine together made its step as many times as fast.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import default_collate

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine, one_process
from benchmarks.harness.timing import in_blocks, ratio
from benchmarks.harness.token_files import megatron_dataset, registered, write_pair
from benchmarks.training_step import COMMON, gpt4moe_step, random_batch
from gpt4moe.config.load import load_run_config
from gpt4moe.data.loader import SampleStream, build_data
from gpt4moe.model.gpt import build_model

TARGET_TOKENS_PER_SECOND, TARGET_RATIO, TARGET_OF_TINY = 20e6, 1.0, 20.0
BATCH, STEPS, ROUNDS, CALLS = 64, 32, 2, 2
"""The steps of a call read all samples of the files once; the calls of a block, as many samples as the loader works out
places for in one go."""
ROWS = (
    (512, 64, 1, False), (512, 4096, 1, False), (2048, 64, 1, False), (2048, 4096, 1, False), (2048, 4096, 4, False),
    (4096, 4096, 1, False), (2048, 64, 1, True), (2048, 4096, 1, True),
)  # fmt: skip
"""S, tokens of a document, micro-batch, whether positions and losses end with documents."""


def main(arguments: list[str]) -> None:
    read_options(__doc__, arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"Micro-batches of {BATCH} samples a step, processor time of one thread. {machine()}")
    print(f"\n{'':25}us a sample: gpt4moe    again  first pass  Megatron   of it  first pass  M tokens/s  first pass")
    print("    S  document micro-batch")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        reached = [_row(Path(name), *row) for row in ROWS]
        of_tiny = _beside_tiny(Path(name))
    for target, is_reached in zip((f"{TARGET_TOKENS_PER_SECOND / 1e6:.0f}M tokens/s", f"{TARGET_RATIO} of Megatron"),
                                  map(all, zip(*reached, strict=True)), strict=True):  # fmt: skip
        print(f"target: at least {target} in every row: {'reached' if is_reached else 'NOT reached'}")
    is_reached = of_tiny >= TARGET_OF_TINY
    print(f"target: at least {TARGET_OF_TINY:.0f} times what tiny eats: {'reached' if is_reached else 'NOT reached'}")


def _row(folder: Path, seq_length: int, document_tokens: int, micro_batch_size: int, by_document: bool) -> list[bool]:
    """Prints one shape. Returns: whether each target is reached, in the first pass too."""
    pair, documents = folder / f"{seq_length}-{document_tokens}", BATCH * STEPS * seq_length // document_tokens
    if not Path(f"{pair}.bin").exists():
        write_pair(pair, documents=documents, document_tokens=document_tokens, dtype="uint16")
    words = registered(folder, pair.name, pair, seq_length=seq_length)
    run = load_run_config([*words, f"data.document_mask={str(by_document).lower()}", "run.name=t"])
    first_passes = [build_data(run).train for _ in range(ROUNDS * (CALLS + 1))]
    contenders = {
        "gpt4moe": _passes(build_data(run).train, micro_batch_size),
        "gpt4moe, again": _passes(build_data(run).train, micro_batch_size),
        "gpt4moe, first pass": lambda: _passes(first_passes.pop(), micro_batch_size)(),
        "Megatron-core": _megatron_passes(folder, pair, seq_length, micro_batch_size, by_document),
    }
    contenders["gpt4moe"]()
    contenders["gpt4moe, again"]()
    seconds = in_blocks(contenders, ROUNDS, steps=CALLS, alone=False)
    micro_seconds = {name: 1e6 * median(times) / (BATCH * STEPS) for name, times in seconds.items()}
    ours = ("gpt4moe", "gpt4moe, first pass")
    of_megatron = [ratio(seconds["Megatron-core"], seconds[name]) for name in ours]
    rates = [seq_length / micro_seconds[name] for name in ours]  # millions a second
    print(f"{seq_length:5}{document_tokens:10}{micro_batch_size:8}{' apart' if by_document else '      '}"
          f"{micro_seconds['gpt4moe']:21.1f}{micro_seconds['gpt4moe, again']:9.1f}{micro_seconds[ours[1]]:12.1f}"
          f"{micro_seconds['Megatron-core']:10.1f}{of_megatron[0]:8.2f}{of_megatron[1]:12.2f}{rates[0]:12.1f}"
          f"{rates[1]:12.1f}")  # fmt: skip
    return [min(rates) >= TARGET_TOKENS_PER_SECOND / 1e6, min(of_megatron) >= TARGET_RATIO]


def _beside_tiny(folder: Path) -> float:
    """Prints what tiny eats and what the loader makes of it. Returns: the least ratio of the two, with all cores."""
    run = load_run_config(list(COMMON))
    length, sizes = run.model.seq_length, run.training
    pair = write_pair(folder / "tiny", documents=BATCH * STEPS * length // 64, document_tokens=64, dtype="uint16")
    stream = build_data(load_run_config([*registered(folder, "tiny", pair, seq_length=length), "run.name=t"])).train
    batches = [random_batch(run)] * (sizes.global_batch_size // sizes.micro_batch_size)
    with one_process(1) as groups:
        step, _ = gpt4moe_step(build_model(run, groups), run, groups, batches)
        loader = _passes(stream, sizes.micro_batch_size, sizes.global_batch_size)
        seconds = in_blocks({"tiny": step, "loader": loader}, 2 * ROUNDS, alone=False)
    rates = {
        name: steps * sizes.global_batch_size * length / median(seconds[name])
        for name, steps in (("tiny", 1), ("loader", STEPS))
    }
    cores = len(os.sched_getaffinity(0))
    times = rates["loader"] / rates["tiny"]
    print(
        f"tiny, a step of {sizes.global_batch_size} x {length} tokens: {rates['tiny']:,.0f} tokens/s; the loader, its "
        f"micro-batches: {rates['loader'] / 1e6:.1f}M: {times:,.0f} times, {times / cores:,.0f} if {cores} cores made "
        f"its step {cores} times as fast"
    )
    return times / cores


def _passes(stream: SampleStream, micro_batch_size: int, batch_size: int = BATCH) -> Callable[[], None]:
    """Each call reads the next STEPS steps."""
    consumed = count(0, batch_size)

    def run() -> None:
        for first in islice(consumed, STEPS):
            stream.micro_batches(
                first, global_batch_size=batch_size, micro_batch_size=micro_batch_size, dp=1, dp_index=0
            )  # fmt: skip

    return run


def _megatron_passes(
    folder: Path, pair: Path, seq_length: int, micro_batch_size: int, by_document: bool
) -> Callable[[], None]:
    samples = BATCH * STEPS - 1  # of one epoch: the last label needs a token of its own
    cache = folder / f"{pair.name}-{by_document}"
    train = megatron_dataset(pair, cache, samples=samples, seq_length=seq_length, by_document=by_document)

    def run() -> None:
        for first in range(0, BATCH * STEPS, micro_batch_size):
            default_collate([train[n % samples] for n in range(first, first + micro_batch_size)])

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
