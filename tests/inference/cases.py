"""Models and layouts that generation is tested on, and one world of ranks that walks through all of them.

Weights are drawn ten times as large as in training (init_std=0.3). With small ones a model says one token for ever, and
a test of its text cannot fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.inference.batch import Row
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.image_cache import LatentMaker
from gpt4moe.inference.requests import Completion, Limits, Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout

BASE = (
    "+experiment=tiny", "run.name=test", "data=mock", "model.num_layers=4", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=64", "model.vocab_size=128",
    "model.moe.num_experts=4", "model.moe.ffn_hidden_size=24", "model.ffn_hidden_size=48", "model.init_std=0.3",
    "training.global_batch_size=8", "training.micro_batch_size=1", "optimizer.lr=0.003", "schedule=constant",
    "schedule.total_steps=100", "schedule.warmup_steps=0",
)  # fmt: skip
MODELS = {
    "top2": (),
    "tied": ("model.tied_embeddings=true", "model.qk_norm=true"),
    "switch, capacity, noise": (
        "router@model.moe.router=switch", "model.moe.top_k=1", "model.moe.router.capacity_factor=1.0",
        "model.moe.router.input_jitter=0.1",
    ),
    "sigmoid bias, shared experts": (
        "router@model.moe.router=sigmoid_bias", "model.moe.shared_expert_ffn_hidden_size=16",
        "model.moe.dense_first_layers=1",
    ),
    "group limited, dense layers": (
        "router@model.moe.router=group_limited", "model.moe.num_experts=8", "model.moe.router.num_groups=4",
        "model.moe.router.group_topk=2", "model.moe.layer_pattern=[1,0,1,1]",
    ),
}  # fmt: skip
_PARTS = (
        "stage=vision", "+vision@model.vision=tiny", "model.vision.encoder.image_size=16",
        "model.vision.encoder.hidden_size=16", "model.vision.encoder.num_layers=1",
        "model.vision.encoder.ffn_hidden_size=16", "model.vision.resampler.num_latents=4",
        "model.vision.cross_attention_every=2", "model.vision.ffn_hidden_size=24",
)  # fmt: skip
SEEING = {"vision": _PARTS, "vision, every expert": (*_PARTS, "model.moe.top_k=4")}
"""Models that read images; gates are to be opened (test_images). With every expert for every token no product gets
another number of rows when another text's tokens change, so round-off does not move either."""
LAYOUTS = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "ep4": {"ep": 4},
    "pp2-ep2": {"pp": 2, "ep": 2},
    "tp2-ep2": {"tp": 2, "ep": 2},
    "tp2-ep4": {"tp": 2, "ep": 4},
    "etp2": {"etp": 2},
    "tp2-ep2-etp2": {"tp": 2, "ep": 2, "etp": 2},
    "tp2-pp2-ep2": {"tp": 2, "pp": 2, "ep": 2},
    "tp2-pp2-vpp2-etp2": {"tp": 2, "pp": 2, "vpp": 2, "etp": 2},
    "cp2-pp2-ep2": {"cp": 2, "pp": 2, "ep": 2},
}
"""Each on four ranks, so several have copies of the model."""
ON_TWO = {"ep2": {"ep": 2}}
ON_EIGHT = {"8 ranks": {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 2}}
"""Two copies, whose ranks share experts, each expert cut over a tp group of one of them."""
NEW_TOKENS = 8


def prompts(lengths: Sequence[int] = (5, 17, 1, 33, 16), vocab_size: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def run_of(model: str, **degrees: int) -> RunConfig:
    return load_run_config(
        [*BASE, *(MODELS | SEEING)[model], *(f"parallel.{name}={size}" for name, size in degrees.items())]
    )


@dataclass
class Written:
    """What one copy of the model wrote."""

    texts: list[Completion]
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(number of the request among its copy's, position) -> [V], on the rank that draws."""


def greedy(some: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> list[Request]:
    return [Request(prompt=prompt, max_tokens=new_tokens, sampling=Sampling(temperature=0)) for prompt in some]


def write(
    chunks: list[Any], run: RunConfig, groups: ProcessGroups, requests: Sequence[Request],
    limits: Limits | None = None, maker: LatentMaker | None = None,
) -> Written:  # fmt: skip
    """All requests' texts, and the logits that this rank drew from."""
    found = Written([])

    def watch(rows: Sequence[Row], logits: Tensor) -> None:
        for row, values in zip(rows, logits, strict=True):
            found.logits[row.number, len(row.tokens)] = values.clone()

    found.texts = Generator(chunks, run, groups, limits=limits, watch=watch, maker=maker).generate_all(requests)
    return found


Job = Callable[[list[Any], RunConfig, ProcessGroups], Any]


def walk(environment: Environment, cases: list[tuple[str, str]], job: Job) -> list[Any]:
    """What `job` returns for each (model, layout) on this rank; weights are the initial ones, equal on all layouts."""
    with world(environment) as device:
        found = []
        for model, name in cases:
            run = run_of(model, **(LAYOUTS | ON_TWO | ON_EIGHT).get(name, {}))
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            found.append(job(build_model(run, groups), run, groups))
        return found


@torch.no_grad()
def without_cache(chunk: Any, prompt: list[int], new_tokens: int = NEW_TOKENS) -> tuple[list[int], Tensor]:
    """(greedy tokens, the logits each was taken from [new_tokens, V]) by the trainer's forward pass over everything
    before, again for each token."""
    tokens, logits = list(prompt), []
    for _ in range(new_tokens):
        batch = torch.tensor([tokens])
        logits.append(chunk(batch, torch.arange(len(tokens))[None], None)[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(logits)
