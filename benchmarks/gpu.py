"""A bf16 training step of a slice of Mixtral 8x7B on one GPU: tokens/s, MFU, peak memory.

    python benchmarks/gpu.py                              two layers, 65 GB
    python benchmarks/gpu.py --layers 4 --micro-batch 4   more of a larger GPU
    python benchmarks/gpu.py --experts per_expert         the other expert kernel

Needs a CUDA build of torch, and the triton that it brings: flash kernels of scaled_dot_product_attention, torch's
grouped_mm over rows padded by our dispatch, one SwiGLU kernel each way, fused AdamW with fp32 masters and gradients.
Measured is the whole step: micro-batches forward and backward, gradient norm, clipping, update. Weights are drawn on
the CPU first (a minute).

MFU = model FLOPs of the tokens of a second / the device's dense bf16 FLOP/s (configs/cluster, by the device's name).
Model FLOPs are the planner's (architecture/flops.py): layers, output layer and causal attention, nothing recomputed.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from statistics import median

import torch

# Run as a file, the packages lie beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.process import one_process
from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import set_cuda_variables
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step

# Part of the name torch gives the device -> configs/cluster.
CLUSTERS = {"H200": "h200_141g", "H100": "h100_80g", "A100": "a100_80g"}
WARMUP = 3


def main(arguments: list[str]) -> int:
    """Exit status: 0 measured, 2 no GPU."""
    options = _options(arguments)
    set_cuda_variables()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none on this machine.")
        return 2
    logging.getLogger().setLevel(logging.ERROR)
    name = torch.cuda.get_device_name()
    cluster = next((cluster for part, cluster in CLUSTERS.items() if part in name), None)
    run = load_run_config([
        "+experiment=mixtral_slice", "run.name=benchmark", f"model.num_layers={options.layers}",
        f"training.micro_batch_size={options.micro_batch}",
        f"training.global_batch_size={options.micro_batch * options.micro_batches}",
        f"kernels.experts={options.experts}", f"cluster={cluster or 'cpu'}",
    ])  # fmt: skip
    with one_process() as groups:
        seconds, num_parameters = measure(run, groups, options.steps)
    tokens = run.training.global_batch_size * run.model.seq_length
    flops = flops_per_token(run.model).model * tokens / seconds
    print(f"{name}, torch {torch.__version__}")
    print(f"{options.layers} layers of Mixtral 8x7B, {num_parameters / 1e9:.2f}B parameters, bf16")
    print(f"step of {tokens} tokens   {seconds:9.3f} s (median of {options.steps})")
    print(f"tokens/s               {tokens / seconds:9.0f}")
    print(f"model TFLOP/s          {flops / 1e12:9.1f}")
    if cluster is None:
        print("MFU                    unknown: no file of configs/cluster fits this device")
    else:
        peak = run.cluster.peak_flops_bf16
        print(f"MFU                    {100 * flops / peak:8.1f} % of {peak / 1e12:.0f} TFLOP/s ({cluster})")
    print(f"peak memory            {torch.cuda.max_memory_allocated() / 1e9:9.1f} GB")
    return 0


def measure(run: RunConfig, groups: ProcessGroups, steps: int) -> tuple[float, int]:
    """Median seconds of a whole step, and the number of parameters."""
    chunks = build_model(run, groups)
    num_parameters = sum(parameter.numel() for parameter in chunks[0].parameters())
    engine = MegatronEngine(chunks, run, groups)
    runner = StepRunner(run, engine, groups)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(WARMUP + steps):
        batches = [batch.pinned() for batch in _batches(run, generator)]  # as data.prefetch does
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_step(runner, 1 + step, batches)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARMUP:]), num_parameters


def _batches(run: RunConfig, generator: torch.Generator) -> list[Batch]:
    rows, length = run.training.micro_batch_size, run.model.seq_length
    positions, mask = torch.arange(length).repeat(rows, 1), torch.ones(rows, length)
    batches = []
    for _ in range(run.training.global_batch_size // rows):
        text = torch.randint(0, run.model.vocab_size, (rows, length + 1), generator=generator)
        batches.append(Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), positions, mask))
    return batches


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="26 GB each with optimizer state (default 2)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of 4096 tokens (default 1)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of one step (default 4)")
    parser.add_argument("--steps", type=int, default=10, help="timed, after 3 of warm-up (default 10)")
    parser.add_argument("--experts", choices=["auto", "grouped_mm", "per_expert"], default="auto", help="kernel")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
