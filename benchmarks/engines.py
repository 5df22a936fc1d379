"""A whole training step under engine=deepspeed, as a multiple of the same step under engine=megatron; two ranks, dp 2.

    python -m benchmarks.engines              by the clock
    python -m benchmarks.engines --shared     on a machine that others use: CPU time

The engines wrap the same model of 21.9M parameters in the same two processes (one thread each, gloo) and take their
steps in turns. Few tokens show what a step costs beside the model: reduction, norm, clipping, AdamW, all-gather.
"""

import logging
import os
import sys
from collections.abc import Callable
from statistics import median

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine
from benchmarks.harness.timing import interleaved, ratio
from benchmarks.training_step import COMMON, SHAPES
from gpt4moe.config.load import load_run_config
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.local_ranks import run_ranks
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.training.build import ENGINES
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step

CONTENDERS = {
    "megatron": (),
    "deepspeed": ("engine=deepspeed",),
    "deepspeed, offload": ("engine=deepspeed", "engine.offload_optimizer=true"),
}
CASES = (("fp32", 64), ("bf16", 64), ("fp32", 1024))  # precision, tokens of a rank
SHAPE, RANKS, ROUNDS = "one micro-batch of 2,048 tokens", 2, 9
TIMEOUT_SECONDS = 1800


def main(arguments: list[str]) -> None:
    is_shared = read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks' imports
    run_ranks(RANKS, _rank, not is_shared, timeout_seconds=TIMEOUT_SECONDS)


def _rank(environment: Environment, alone: bool) -> None:
    logging.disable(logging.WARNING)
    rank = environment.rank
    with world(environment) as device:
        groups = None
        for precision, tokens in CASES:
            shape = (
                *COMMON, *SHAPES[SHAPE], f"precision={precision}", "parallel.ep=2", f"model.seq_length={tokens}",
                "training.micro_batch_size=1", f"training.global_batch_size={RANKS}",
            )  # fmt: skip
            if groups is None:
                run = load_run_config(list(shape))
                layout = Layout.from_config(run.parallel, RANKS)
                groups = ProcessGroups.create(layout, rank, device, run.run.seed)
            steps = {name: _step(shape + more, groups) for name, more in CONTENDERS.items()}
            seconds = interleaved(steps, ROUNDS, alone=alone)
            if rank == 0:
                _show(f"{precision}, {tokens} tokens a rank", seconds, alone)


def _step(overrides: tuple[str, ...], groups: ProcessGroups) -> Callable[[], None]:
    run = load_run_config(list(overrides))
    engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
    runner = StepRunner(run, engine, groups)
    batches = synthetic_batches(run, 1, groups.layout.dp, groups.coordinate["dp"])

    def step() -> None:
        train_step(runner, 1, batches)

    return step


def _show(title: str, seconds: dict[str, list[float]], alone: bool) -> None:
    print(f"\n{title:32}median ms   ratio   {machine() if alone else machine() + ', CPU time'}")
    for name, times in seconds.items():
        print(f"  {name:30}{1e3 * median(times):9.1f}   {ratio(times, seconds['megatron']):5.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
