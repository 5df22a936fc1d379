"""A whole training step of one process, fp32 on the CPU: tokens/s of gpt4moe over Hugging Face Mixtral's.

    python -m benchmarks.training_step              two threads, by the clock
    python -m benchmarks.training_step --shared     on a machine that others use: one thread, CPU time

All: the same weights, so the same tokens at the same experts, and the same loss, else nothing is measured; the same
micro-batches, scaled_dot_product_attention, load-balancing loss, forward, backward, clipping by the global norm, fused
AdamW at a rate that moves no weight (harness/peers.py). Hugging Face's experts are torch's grouped_mm, Megatron's a
loop; ours alone has a z-loss and counts its routing. Blocks of four steps after one that is not counted, in both
orders. "Listed twice" is gpt4moe once more, in the same process: what it misses of the row above is noise. "Its
products alone" runs the matrix products and attention kernels of the step of gpt4moe again, on tensors that are there:
whoever computes them by the same library gets no further than their ratio. Target: gpt4moe at least 1.15.
"""

import logging
import sys
from collections.abc import Mapping
from math import isclose
from statistics import median

import torch
from torch import nn

from benchmarks.harness.command import read_options
from benchmarks.harness.peers import Step, megatron, mixtral
from benchmarks.harness.process import machine, one_process
from benchmarks.harness.products import products_of
from benchmarks.harness.timing import in_blocks, ratio
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step

COMMON = ("+experiment=tiny", "run.name=benchmark", "data=mock", "optimizer.lr=1e-12")
"""Weights that stay keep every contender's routing as it is in all steps."""
EIGHT_EXPERTS = (
    "model.seq_length=256", "model.vocab_size=8192", "model.moe.num_experts=8", "training.micro_batch_size=8",
    "training.global_batch_size=8",
)  # fmt: skip
SHAPES = {
    "tiny as shipped": (),
    "one micro-batch of 2,048 tokens": (
        *EIGHT_EXPERTS, "model.hidden_size=256", "model.num_attention_heads=4", "model.num_query_groups=2",
        "model.moe.ffn_hidden_size=688",
    ),
    "the same, six layers of hidden 512": (
        *EIGHT_EXPERTS, "model.num_layers=6", "model.hidden_size=512", "model.num_attention_heads=8",
        "model.num_query_groups=4", "model.moe.ffn_hidden_size=1408",
    ),
}  # fmt: skip
ROUNDS, THREADS = 6, 2
TARGET = 1.15
PEER, NATIVE, OURS = "Hugging Face Mixtral", "Megatron's own MoE", "gpt4moe"
AGAIN, FLOOR = "gpt4moe, listed twice", "its products alone"


def main(arguments: list[str]) -> None:
    alone = not read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    logging.getLogger().setLevel(logging.ERROR)
    with one_process(THREADS if alone else 1) as groups:
        print(f"One training step, fp32, fused AdamW. {machine()}{'' if alone else ', CPU time of one thread'}")
        for name, overrides in SHAPES.items():
            _compare(name, load_run_config([*COMMON, *overrides]), groups, alone)


def _compare(name: str, run: RunConfig, groups: ProcessGroups, alone: bool) -> None:
    batches = [random_batch(run)] * (run.training.global_batch_size // run.training.micro_batch_size)
    chunks = build_model(run, groups)
    theirs, their_size = mixtral(chunks, run, groups, batches)
    native, native_size = megatron(chunks, run, groups, batches)
    ours, ours_size = gpt4moe_step(chunks, run, groups, batches)
    assert ours_size == their_size == native_size, f"{ours_size} parameters against {their_size} and {native_size}"
    require_same_loss({PEER: theirs, NATIVE: native, OURS: ours})
    floor = products_of(ours)
    seconds = in_blocks({PEER: theirs, NATIVE: native, OURS: ours, AGAIN: ours, FLOOR: floor}, ROUNDS, alone=alone)
    tokens = len(batches) * batches[0].tokens.numel()
    micro = f"{len(batches)} of {batches[0].tokens.numel():,} tokens"
    print(f"\n{name}: {ours_size / 1e6:.1f}M parameters, micro-batches {micro}")
    print(f"{'':24}tokens/s   median ms   ratio")
    for who, times in seconds.items():
        print(
            f"{who:24}{tokens / median(times):8.0f}   {1e3 * median(times):9.1f}   {ratio(seconds[PEER], times):5.2f}"
        )
    found = ratio(seconds[PEER], seconds[OURS])
    print(f"target: gpt4moe at least {TARGET:.2f}: {'reached' if found >= TARGET else 'NOT reached'}")


def random_batch(run: RunConfig) -> Batch:
    rows, length = run.training.micro_batch_size, run.model.seq_length
    text = torch.randint(0, run.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=text[:, :-1].contiguous(),
        labels=text[:, 1:].contiguous(),
        position_ids=torch.arange(length).repeat(rows, 1),
        loss_mask=torch.ones(rows, length),
    )


def gpt4moe_step(
    chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups, batches: list[Batch]
) -> tuple[Step, int]:
    """A whole training step on these micro-batches, and the model's parameters."""
    size = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    engine = MegatronEngine(chunks, run, groups)
    runner = StepRunner(run, engine, groups)

    def step() -> float:
        return train_step(runner, 1, batches).result.loss

    return step, size


def require_same_loss(steps: Mapping[str, Step]) -> None:
    """Takes a step of each. Raises: AssertionError when two that have a loss do not have the same."""
    losses = {who: loss for who, step in steps.items() if (loss := step()) is not None}
    first = next(iter(losses.values()))
    assert all(isclose(loss, first, rel_tol=1e-5) for loss in losses.values()), f"other work: losses {losses}"


if __name__ == "__main__":
    main(sys.argv[1:])
