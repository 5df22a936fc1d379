"""A whole training step of two ranks, fp32 on the CPU: tokens/s of gpt4moe over Megatron's own MoE and Hugging Face's.

    python -m benchmarks.training_ranks              by the clock
    python -m benchmarks.training_ranks --shared     on a machine that others use: CPU time, so waiting does not count

`tiny` as shipped on each of its layouts of two ranks, a thread each, over gloo. All have the same weights, loss,
micro-batches, attention, load-balancing loss, clipping and fused AdamW (harness/peers.py): Megatron-core with its
sharded optimizer, and where no layer is cut Hugging Face's Mixtral with torch's DistributedDataParallel. Blocks of four
steps after one that is not counted, in both orders; gpt4moe is listed twice. Targets: at least 1.15 of Megatron, 1.00
of Hugging Face.
"""

import logging
import os
import sys
from statistics import median

from benchmarks.harness.command import read_options
from benchmarks.harness.peers import megatron, mixtral
from benchmarks.harness.process import machine
from benchmarks.harness.timing import in_blocks, ratio
from benchmarks.training_step import COMMON, OURS, gpt4moe_step, random_batch, require_same_loss
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.local_ranks import run_ranks

LAYOUTS = {
    "dp2": (),
    "dp2, ep2": ("parallel.ep=2",),
    "tp2, ep2": ("parallel.tp=2", "parallel.ep=2"),
    "pp2": ("parallel.pp=2",),
}
MEGATRON, MIXTRAL, AGAIN = "Megatron's own MoE", "Hugging Face Mixtral, DDP", "gpt4moe, listed twice"
TARGETS = {MEGATRON: 1.15, MIXTRAL: 1.0}
RANKS, ROUNDS, TIMEOUT_SECONDS = 2, 6, 1800


def main(arguments: list[str]) -> None:
    is_shared = read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks' imports
    for name in LAYOUTS:
        run_ranks(RANKS, _rank, name, not is_shared, timeout_seconds=TIMEOUT_SECONDS)


def _rank(environment: Environment, name: str, alone: bool) -> None:
    logging.disable(logging.WARNING)
    run = load_run_config([*COMMON, *LAYOUTS[name]])
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, RANKS)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        seconds = _seconds(run, groups, alone)
    if environment.rank == 0:
        _show(f"{name}: {run.training.global_batch_size} x {run.model.seq_length} tokens", run, seconds, alone)


def _seconds(run: RunConfig, groups: ProcessGroups, alone: bool) -> dict[str, list[float]]:
    of_rank = run.training.global_batch_size // (run.training.micro_batch_size * groups.layout.dp)
    batches = [random_batch(run)] * of_rank
    chunks = build_model(run, groups)
    native, native_size = megatron(chunks, run, groups, batches)
    peers = {MEGATRON: native}
    if groups.layout.dp == RANKS and groups.layout.ep == 1:
        peers[MIXTRAL], _ = mixtral(chunks, run, groups, batches)
    ours, ours_size = gpt4moe_step(chunks, run, groups, batches)
    assert ours_size == native_size, f"{ours_size} parameters against {native_size}"
    contenders = {MEGATRON: native, OURS: ours, AGAIN: ours, **peers}
    require_same_loss(contenders)
    return in_blocks(contenders, ROUNDS, alone=alone)


def _show(title: str, run: RunConfig, seconds: dict[str, list[float]], alone: bool) -> None:
    tokens = run.training.global_batch_size * run.model.seq_length
    print(f"\n{title}; {machine()}{'' if alone else ', CPU time'}")
    print(f"{'':28}tokens/s   median ms   gpt4moe over it")
    for who, times in seconds.items():
        found, target = ratio(times, seconds[OURS]), TARGETS.get(who)
        said = "" if target is None else f"   at least {target:.2f}: {'reached' if found >= target else 'NOT reached'}"
        print(f"{who:28}{tokens / median(times):8.0f}   {1e3 * median(times):9.1f}   {found:5.2f}{said}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
