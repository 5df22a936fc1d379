"""What test_gpu.py compares, on whatever device torch sees: `python -m tests.gpu.one_process WHAT DTYPE KERNEL`.

The last line of stdout is JSON: the device, and lists of numbers by name.
"""

import json
import sys
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import torch

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.config.load import load_run_config
from gpt4moe.config.moe import MoEConfig, RouterConfig
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.data.prefetch import Prefetch
from gpt4moe.model.attention import SdpaAttention
from gpt4moe.model.documents import PackedDocuments
from gpt4moe.model.gpt import build_model
from gpt4moe.model.transformer_config import TORCH_DTYPES
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.checkpointing import Staging
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.pieces import owned_pieces
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.distributed.case import BASE, synthetic_batches

HIDDEN, FFN, TOKENS = 64, 96, 200


def layer(groups: ProcessGroups, dtype: Dtype, kernel: ExpertKernel) -> dict[str, list[float]]:
    """Output and gradients of one layer; weights and input are drawn on the CPU. Expert 3 gets no token."""
    device, torch_dtype = groups.device, TORCH_DTYPES[dtype]
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=torch_dtype, use_cpu_initialization=False)
    moe = MoEConfig(num_experts=8, ffn_hidden_size=FFN, top_k=2, router=RouterConfig(load_balancing_coefficient=0.1))
    made = ExpertParallelMLP(config, moe, kernel, groups)
    made.auxiliary_scale = 1.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        hidden, gradient = torch.randn(2, TOKENS, 1, HIDDEN, generator=generator).to(device, torch_dtype).unbind()
        hidden[..., 0] = 10.0
        made.router.weight[3] = 0.0
        made.router.weight[3, 0] = -10.0
    hidden = hidden.clone().requires_grad_()
    output, _ = made(hidden)
    output.backward(gradient)
    assert made.experts.down.grad is not None and not made.experts.down.grad[3].any()
    named = {"output": output, "input": hidden.grad} | {name: p.grad for name, p in made.named_parameters()}
    return {name: value.detach().float().flatten().tolist() for name, value in named.items() if value is not None}


def steps(groups: ProcessGroups, dtype: Dtype, kernel: ExpertKernel) -> dict[str, list[float]]:
    """Losses and gradient norms of three AdamW steps of the layout tests' model, and sizes of the tensors that a save
    copies to host memory. On a GPU batches come from pinned memory, and the copy goes to locked pages."""
    run = load_run_config([*BASE, f"precision={dtype.value}", f"kernels.experts={kernel.value}"])
    engine = MegatronEngine(build_model(run, groups), run, groups)
    runner = StepRunner(run, engine, groups)
    result: dict[str, list[float]] = {"losses": [], "norms": []}
    with closing(Prefetch(lambda step: synthetic_batches(run, step, 1, 0), groups.device)) as prefetch:
        for step in range(1, 4):
            batches = prefetch.take(step, following=step + 1 if step < 3 else None)
            assert batches[0].tokens.is_pinned() == (groups.device.type == "cuda")
            done = train_step(runner, step, batches)
            result["losses"].append(done.result.loss)
            result["norms"].append(done.grad_norm)
    weights = [piece for piece in owned_pieces(engine, groups) if piece.tensor.startswith("weight/")]
    result["saved"] = [float(piece.values.norm()) for piece in Staging().copy(weights)]
    return result


def documents(groups: ProcessGroups, dtype: Dtype, kernel: ExpertKernel) -> dict[str, list[float]]:
    """Output and gradients of attention inside documents, of whole rows and of the last of four chunks of queries."""
    attention = SdpaAttention(None, 1, pg_collection=SimpleNamespace(cp=groups.megatron.cp), softmax_scale=0.2)
    rows = torch.tensor([[0] * 37 + [1] * 3 + [2] * 88, [0] * 128])
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(128, 2, heads, 64, generator=generator).to(groups.device, TORCH_DTYPES[dtype]).requires_grad_()
        for heads in (4, 2, 2)
    ]
    found = {"whole": attention(*parts, None, packed_seq_params=PackedDocuments.of(rows, groups.device))}
    (_, last) = PackedDocuments.of(rows, groups.device, cp=2).chunks
    found["chunk"] = attention._by_document(parts[0][96:], *parts[1:], [last])
    gradients = torch.autograd.grad(sum(out.float().square().sum() for out in found.values()), parts)
    found |= dict(zip(("query", "key", "value"), gradients, strict=True))
    return {name: value.detach().float().flatten().tolist() for name, value in found.items()}


def main(what: str, dtype: str, kernel: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    environment = Environment(rank=0, world_size=1, local_rank=0, master=None, source="test")
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(ParallelConfig(), 1), 0, device, seed=1)
        compute: Any = {"layer": layer, "steps": steps, "documents": documents}[what]
        print(json.dumps({"device": device.type} | compute(groups, Dtype(dtype), ExpertKernel(kernel))))


if __name__ == "__main__":
    main(*sys.argv[1:])
