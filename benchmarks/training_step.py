"""A whole training step of one process, fp32 on the CPU: tokens/s of gpt4moe over Hugging Face Mixtral's.

    python -m benchmarks.training_step              two threads, by the clock
    python -m benchmarks.training_step --shared     on a machine that others use: one thread, CPU time

Both sides: the same shape and batch, scaled_dot_product_attention, forward, backward, clipping by the global norm,
fused AdamW. Hugging Face's experts are torch's grouped_mm; its router has no auxiliary losses here, ours has both.
Target: gpt4moe at least 1.00.
"""

import logging
import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine, one_process
from benchmarks.harness.timing import interleaved, ratio
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step

SHAPE = (
    "+experiment=tiny", "run.name=benchmark", "data=mock", "model.num_layers=4", "model.hidden_size=256",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=256", "model.vocab_size=8192",
    "model.moe.num_experts=8", "model.moe.ffn_hidden_size=688", "training.micro_batch_size=8",
    "training.global_batch_size=8",
)  # fmt: skip
ROUNDS, THREADS = 9, 2
TARGET = 1.00


def main(arguments: list[str]) -> None:
    alone = not read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    logging.getLogger().setLevel(logging.ERROR)
    run = load_run_config(list(SHAPE))
    with one_process(THREADS if alone else 1) as groups:
        batch = _batch(run)
        ours, ours_size = _gpt4moe(run, groups, batch)
        theirs, their_size = _mixtral(run, batch)
        assert ours_size == their_size, f"{ours_size} parameters against {their_size}"
        tokens = batch.tokens.numel()
        print(f"One training step: {ours_size / 1e6:.1f}M parameters, {tokens} tokens, fp32, fused AdamW.")
        print(machine() if alone else f"{machine()}, CPU time of one thread")
        seconds = interleaved({"Hugging Face Mixtral": theirs, "gpt4moe": ours}, ROUNDS, alone=alone)
        found = ratio(seconds["Hugging Face Mixtral"], seconds["gpt4moe"])
        print(f"\n{'':22}tokens/s   median ms   ratio")
        for name, times in seconds.items():
            shown = found if name == "gpt4moe" else 1.0
            print(f"{name:22}{tokens / median(times):8.0f}   {1e3 * median(times):9.1f}   {shown:5.2f}")
        print(f"target: gpt4moe at least {TARGET:.2f}: {'reached' if found >= TARGET else 'NOT reached'}")


def _batch(run: RunConfig) -> Batch:
    rows, length = run.training.micro_batch_size, run.model.seq_length
    text = torch.randint(0, run.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=text[:, :-1].contiguous(),
        labels=text[:, 1:].contiguous(),
        position_ids=torch.arange(length).repeat(rows, 1),
        loss_mask=torch.ones(rows, length),
    )


def _gpt4moe(run: RunConfig, groups: ProcessGroups, batch: Batch) -> tuple[Callable[[], None], int]:
    chunks = build_model(run, groups)
    size = sum(parameter.numel() for parameter in chunks[0].parameters())
    engine = MegatronEngine(chunks, run, groups)
    runner = StepRunner(run, engine, groups)

    def step() -> None:
        train_step(runner, 1, [batch])

    return step, size


def _mixtral(run: RunConfig, batch: Batch) -> tuple[Callable[[], None], int]:
    from transformers import MixtralConfig, MixtralForCausalLM

    model, moe = run.model, run.model.moe
    assert moe is not None
    config = MixtralConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=moe.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups, max_position_embeddings=model.seq_length,
        num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k, sliding_window=None, use_cache=False,
        attn_implementation="sdpa", experts_implementation="grouped_mm",
    )  # fmt: skip
    mixtral = MixtralForCausalLM(config).train()
    parameters = list(mixtral.parameters())
    settings = run.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        mixtral(batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()

    return step, sum(parameter.numel() for parameter in parameters)


if __name__ == "__main__":
    main(sys.argv[1:])
