"""A random run and layout from a seed: meshes, stages, patterns, experts, routers, precision, engine,
recompute, padding, documents.

What is drawn is asked of the configuration's own checks and of parallel.legality, and drawn again until both agree: a
refused combination is no test, an accepted one is a promise.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

from gpt4moe.config.load import load_run_config
from gpt4moe.config.model import divisors
from gpt4moe.config.moe import ROUTER_TRAITS, RouterKind
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from tests.distributed.case import BASE

# Of a padded batch half is left, of which a third counts. In bf16 a single choice of an expert that rounding turns then
# moves gradients by more than a tenth: 24 sequences are too few to tell it from a fault.
FULL_BATCH = "training.global_batch_size=48"


@dataclass(frozen=True)
class Draw:
    """One accepted draw."""

    overrides: tuple[str, ...]
    run: RunConfig
    layout: Layout
    is_padded: bool
    """Whether its batches are distributed.padding's."""

    def __str__(self) -> str:
        return " ".join((*self.overrides, *(["(padded)"] if self.is_padded else [])))


def draw(seed: int) -> Draw:
    """The same for the same seed, as long as the rules of what is legal stay the same."""
    rng = random.Random(seed)
    # A generator of its own: the layouts of all seeds stay those that they were before there were documents.
    documents = ("data.document_mask=true",) if random.Random(f"documents {seed}").random() < 0.3 else ()
    fused = ("kernels.weight_gradients=fused",) if random.Random(f"fused {seed}").random() < 0.5 else ()
    while True:
        world_size = rng.choice((2, 4, 4, 4, 4, 6, 8))
        overrides, is_padded = proposal(rng, world_size), rng.random() < 0.3
        if is_padded:
            overrides = (*overrides, FULL_BATCH)
        overrides = (*overrides, *documents, *([] if "engine=deepspeed" in overrides else fused))
        try:
            run = load_run_config([*BASE, *overrides])
            require_legal(run.model, run.parallel, run.training, world_size)
        except (ConfigError, LayoutError):
            continue
        return Draw(overrides, run, Layout.from_config(run.parallel, world_size), is_padded)


def proposal(rng: random.Random, world_size: int) -> tuple[str, ...]:
    """Overrides that nobody has looked at yet, most of them legal: else deep pipelines would hardly ever be drawn."""
    mesh = _mesh(rng, world_size)
    stages = mesh["pp"] * mesh["vpp"]
    num_layers = rng.randint(max(2, stages), max(6, stages))
    return (
        *(f"parallel.{axis}={size}" for axis, size in mesh.items()), *_stages(rng, stages, num_layers),
        *_recompute(rng), *_model(rng, mesh, num_layers), *_run(rng), *_beside_the_router(rng), *_engine(rng),
    )  # fmt: skip


def _mesh(rng: random.Random, world_size: int) -> dict[str, int]:
    sizes, rest = {}, world_size
    for axis in rng.sample(("tp", "pp", "cp"), 3):
        # Heads and sequence of the tiny model divide by no other tp or cp.
        sizes[axis] = rng.choice([size for size in divisors(rest) if axis == "pp" or size in (1, 2, 4)])
        rest //= sizes[axis]
    stage = world_size // sizes["pp"]
    sizes["ep"] = rng.choice(divisors(stage))
    sizes["etp"] = rng.choice((1, 1, *divisors(stage // sizes["ep"])))
    sizes["vpp"] = rng.choice((1, 2)) if sizes["pp"] > 1 else 1
    return sizes


def _stages(rng: random.Random, stages: int, num_layers: int) -> list[str]:
    """How many layers each has: evenly, by rule, or by list."""
    kind = rng.choice(("even", "rule", "list"))
    if kind == "even" or stages == 1:
        return []
    if kind == "rule":
        return [f"parallel.{end}_counts_as_layer={rng.choice(('true', 'false'))}" for end in ("embedding", "head")]
    cuts = [0, *sorted(rng.sample(range(1, num_layers), stages - 1)), num_layers]
    return [f"parallel.layers_per_stage={[b - a for a, b in pairwise(cuts)]}".replace(" ", "")]


def _recompute(rng: random.Random) -> list[str]:
    kind = rng.choice(("none", "none", "full", "full", "selective", "moe"))
    part = [f"parallel.recompute_layers={rng.choice((1, 1, 2))}"] if kind == "full" and rng.random() < 0.6 else []
    return [f"parallel.recompute={kind}", *part]


def _model(rng: random.Random, mesh: dict[str, int], layers: int) -> list[str]:
    chosen = [f"model.num_layers={layers}", f"model.tied_embeddings={rng.choice(('true', 'false'))}",
              f"model.qk_norm={rng.choice(('true', 'false'))}", "model.ffn_hidden_size=48",
              f"model.num_query_groups={rng.choice([n for n in (2, 4) if n % mesh['tp'] == 0])}"]  # fmt: skip
    if rng.random() < 0.3:
        chosen.append("model.head_dim=10")
    if rng.random() < 0.4:
        chosen.append(f"model.moe.layer_pattern={[rng.randint(0, 1) for _ in range(layers)]}".replace(" ", ""))
    chosen.append(f"model.moe.num_experts={rng.choice([n for n in (4, 6, 8, 12) if n % mesh['ep'] == 0])}")
    return [*chosen, *_router(rng)]


def _router(rng: random.Random) -> list[str]:
    kind = rng.choice((RouterKind.topk, *RouterKind))
    traits = ROUTER_TRAITS[kind]
    group = "top2" if kind is RouterKind.topk else kind.value  # in configs/router
    chosen = [f"router@model.moe.router={group}", f"model.moe.top_k={traits.fixed_top_k or rng.choice((2, 3))}"]
    if traits.has_groups:
        chosen += ["model.moe.router.num_groups=2", f"model.moe.router.group_topk={rng.choice((1, 2))}"]
    chosen += ["model.moe.router.load_balancing_coefficient=0.1", "model.moe.router.z_loss_coefficient=0.01"]
    if rng.random() < 0.3:
        policy = rng.choice(("probability", "position"))
        chosen += [f"model.moe.router.capacity_factor={rng.choice((0.8, 1.25))}",
                   f"model.moe.router.drop_policy={policy}"]  # fmt: skip
    return chosen


def _beside_the_router(rng: random.Random) -> list[str]:
    chosen = [f"model.moe.router.load_balancing_scope={rng.choice(('micro_batch', 'sequence', 'global_batch'))}"]
    if rng.random() < 0.3:
        chosen.append("model.moe.shared_expert_ffn_hidden_size=40")
    if rng.random() < 0.3:
        chosen.append("model.moe.router.input_jitter=0.01")
    return chosen


def _run(rng: random.Random) -> list[str]:
    return [
        f"precision={rng.choice(('fp32', 'fp32', 'bf16'))}",
        f"training.global_batch_size={rng.choice((24, 48))}",
        f"training.micro_batch_size={rng.choice((1, 2))}",
        "optimizer.clip_norm=0.1",
    ]


def _engine(rng: random.Random) -> list[str]:
    kind = rng.choice(("megatron", "megatron", "deepspeed"))
    if kind == "deepspeed":
        return ["engine=deepspeed", f"engine.offload_optimizer={rng.choice(('true', 'false'))}"]
    # A small bucket: several of them in each of the tiny model's buffers. Gathers that overlap follow from both and
    # draw nothing, so that a seed's other keys stay as they were when it was run.
    overlap, bucket = rng.choice(("true", "false")), rng.choice(("null", "5000"))
    gathers = "true" if (overlap, bucket) == ("true", "5000") else "false"
    return ["engine=megatron", f"engine.overlap_grad_reduce={overlap}", f"engine.bucket_size={bucket}",
            f"engine.overlap_param_gather={gathers}"]  # fmt: skip
