"""stack=NAME and beyond.*: a plan for a published stack, or with options that the trainer lacks.

    PROFILES (constants) + STACKS (release, kernels, what its rows miss by) + beyond.* -> Efficiency, Kernels, bytes

A stack is one release: constants age. Rows of Megatron-Bridge in container 26.08 are up to 1.5 times as fast as the
same layouts in 26.04 (docs/performance-summary.md at 067f987df: Qwen3-30B on 8 GB200, 39,936 and 26,112 tokens/s/GPU).
"""

from dataclasses import dataclass, replace

from gpt4moe.config.beyond import Dispatch, Products
from gpt4moe.config.cluster import Generation
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.plan import PlanConfig, beyond_of
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.efficiency import (
    FEWEST_ROWS,
    PROFILES,
    Efficiency,
    ErrorInterval,
    error_interval,
    generation_timing,
    planning_profile,
)

_HAS_MXFP8 = (Generation.blackwell, Generation.blackwell_ultra, Generation.cdna4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What a stack's kernels keep for the backward pass, where they differ from the trainer's."""

    fused_mlp: bool = False
    """A dense MLP keeps gate, up and their product: 3 F a token instead of 5 F."""
    fused_loss: bool = False
    """The loss keeps logits in the model's dtype, not probabilities in fp32."""
    fp32_router_input: bool = True
    """The router keeps an fp32 copy of its tokens, and of its weight."""
    copies_values: bool = False
    """Attention copies queries, keys and values, so that the projection's output is not kept, and passes keys round
    where cp is above 1, without a mask (Transformer Engine's get_qkv_layout and context parallelism)."""
    frees_outputs: bool = False
    """A stage's output is freed when it is sent (deallocate_pipeline_outputs)."""
    fp8_weights: bool = False
    """Weights of fp8 products are kept in fp8 alone (Megatron-Bridge's fp8_param_gather)."""
    shards_gradients: bool = False
    """Gradients are sharded over data-parallel ranks, as the optimizer's states are (ZeRO stage 2)."""
    fragmentation: float = 0.05
    """Share of activations and buffers that is lost between blocks: an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One release of a training stack."""

    release: str
    source: str
    has_experts: bool
    """Whether its rows have experts; without them its profile has no constants of experts."""
    kernels: Kernels
    missed: dict[tuple[Generation, str, str], tuple[int, float, float]]
    """(generation, kind of model, precision) -> its published rows, the least and the most signed error of each, left
    out of the stack's fit, as `python -m benchmarks.planner_error` prints them."""

    def interval(self, generation: Generation, kind: str, precision: str) -> ErrorInterval | None:
        """How far off plans of this stack may be; None: it has no row of the kind.

        By the rows of the generation and the precision, else of the generation, else of all generations: the first of
        these that are FEWEST_ROWS or more; the last, however few. `of` says which.
        """
        wide = ("bf16", "fp8")
        for on, within in ((generation, (precision,)), (generation, wide), (None, wide)):
            of_them = {key: cell for key, cell in self.missed.items()
                       if key[1] == kind and on in (None, key[0]) and key[2] in within}  # fmt: skip
            rows = sum(cell[0] for cell in of_them.values())
            if rows >= (FEWEST_ROWS if on else 1):
                where = generation.value if on else f"all its devices, as {generation.value} has too few"
                said = " and ".join(sorted({key[2] for key in of_them}))
                return ErrorInterval(
                    of=f"{'models with experts' if kind == 'experts' else 'dense models'} of this stack on {where}, "
                    f"{said}, each left out of its fit",
                    rows=rows, least=min(cell[1] for cell in of_them.values()),
                    most=max(cell[2] for cell in of_them.values()),
                )  # fmt: skip
        return None


_TRANSFORMER_ENGINE = Kernels(
    fused_mlp=True, fused_loss=True, fp32_router_input=False, copies_values=True, frees_outputs=True,
    fragmentation=0.01,  # with expandable segments, as Megatron-Bridge's scripts set them
)  # fmt: skip
STACKS = {
    "megatron-lm-2022": Stack(
        release="of arXiv:2205.05198, May 2022", source="arXiv:2205.05198", has_experts=False, kernels=Kernels(),
        missed={(Generation.ampere, "dense", "bf16"): (9, -0.063, 0.069)},
    ),
    "llama3-2024": Stack(
        release="of arXiv:2407.21783, July 2024", source="arXiv:2407.21783", has_experts=False,
        kernels=replace(_TRANSFORMER_ENGINE, shards_gradients=True),  # its section 3.3.2
        missed={(Generation.hopper, "dense", "bf16"): (3, -0.223, 0.009)},
    ),
    "megatron-core-2025": Stack(
        release="of arXiv:2504.14960, April 2025", source="arXiv:2504.14960", has_experts=True,
        kernels=_TRANSFORMER_ENGINE, missed={(Generation.hopper, "experts", "bf16"): (64, -0.205, 0.131)},
    ),
    "megatron-bridge-26.04": Stack(
        release="container 26.04.01, April 2026", source="Megatron-Bridge docs at 067f987df", has_experts=True,
        kernels=replace(_TRANSFORMER_ENGINE, fp8_weights=True),
        missed={
            (Generation.hopper, "dense", "fp8"): (2, -0.027, 0.058),
            (Generation.hopper, "experts", "bf16"): (1, -0.182, -0.182),
            (Generation.hopper, "experts", "fp8"): (2, -0.056, 0.137),
            (Generation.blackwell, "dense", "fp8"): (3, -0.111, 0.083),
            (Generation.blackwell, "experts", "bf16"): (2, -0.148, -0.133),
            (Generation.blackwell, "experts", "fp8"): (6, -0.058, 0.205),
            (Generation.blackwell_ultra, "dense", "fp8"): (3, 0.004, 0.122),
            (Generation.blackwell_ultra, "experts", "bf16"): (2, -0.276, -0.035),
            (Generation.blackwell_ultra, "experts", "fp8"): (6, -0.172, 0.152),
        },
    ),
}  # fmt: skip
"""Name -> stack. PROFILES has its constants, by generation."""

MISSED_DISPATCH = {
    Dispatch.plain: (4, -0.182, 0.028),
    Dispatch.tuned: (2, -0.286, 0.129),
    Dispatch.overlapped: (4, -0.148, 0.137),
}
"""The same of the rows, of any stack, whose dispatcher is not their stack's own."""


def plan_stack(run: RunConfig) -> Stack | None:
    """The stack of stack=; None: the trainer's own.

    Raises: ConfigError for an unknown name, a generation that the stack has no constants for, or a model with experts
    on a stack without any.
    """
    name = run.stack if isinstance(run, PlanConfig) else None
    if name is None:
        return None
    if name not in STACKS:
        raise ConfigError(f"stack={name} is not known.", f"Set stack to one of {', '.join(STACKS)}, or leave it out.")
    generation, has_experts = run.cluster.generation, run.model.moe is not None
    fits = [
        key.split("/")[0] for key in PROFILES
        if generation is not Generation.cdna3  # its profile is derived, no row is behind it
        and key.endswith(f"/{generation.value}") and (STACKS[key.split("/")[0]].has_experts or not has_experts)
    ]  # fmt: skip
    if name not in fits:
        lacks = "models with experts" if has_experts and not STACKS[name].has_experts else f"{generation.value} devices"
        raise ConfigError(
            f"stack={name} has no published row on {lacks}, so no "
            f"constants for this model and cluster={run.cluster.name}.",
            f"Set stack to {' or '.join(fits)}, or leave it out." if fits else "Leave stack out.",
        )
    return STACKS[name]


def kernels_of(run: RunConfig) -> Kernels:
    stack = plan_stack(run)
    return Kernels() if stack is None else stack.kernels


def stack_text(plan: PlanConfig) -> str:
    """Name and release of the stack whose constants time this plan."""
    name = plan.stack or generation_timing(plan.cluster.generation).profile.split("/")[0]
    return f"{name} ({STACKS[name].release})"


def efficiency_of(plan: PlanConfig) -> Efficiency:
    """The constants of a plan: those of stack=, else the trainer's; with beyond.dispatch and beyond.gradients."""
    generation = plan.cluster.generation
    if plan_stack(plan) is None:
        found = planning_profile(generation)
    else:
        found = PROFILES[f"{plan.stack}/{generation.value}"]
    return dispatched(replace(found, gradient_bytes=gradient_bytes(plan)), plan.beyond.dispatch)


def dispatched(efficiency: Efficiency, dispatch: Dispatch | None) -> Efficiency:
    """A stack with another dispatcher than its own; None: with its own."""
    if dispatch is None:
        return efficiency
    if dispatch is not Dispatch.plain:
        return replace(efficiency, is_tuned=True, hides_experts=dispatch is Dispatch.overlapped)
    plain = PROFILES["megatron-core-2025/hopper"]  # the rows that say most about it
    return replace(efficiency, copy_passes=plain.copy_passes, is_tuned=False)


def gradient_bytes(run: RunConfig) -> int:
    """Bytes of one gradient, kept and exchanged."""
    asked = beyond_of(run).gradients
    if asked is not None:
        return 2 if asked is Dtype.bf16 else 4
    if plan_stack(run) is None:
        return 4
    assert isinstance(run, PlanConfig)
    return PROFILES[f"{run.stack}/{run.cluster.generation.value}"].gradient_bytes


def gradient_shares(run: RunConfig, layout: Layout) -> int:
    """Ranks over which one copy of a rank's gradients is cut."""
    return layout.dp * layout.cp if kernels_of(run).shards_gradients else 1


def has_one_fp8_weight(run: RunConfig) -> bool:
    """Whether a weight is one byte: in fp8 alone, and not transposed beside it, which Hopper and scales of 32 elements
    need (Transformer Engine's is_non_tn_fp8_gemm_supported)."""
    turns = run.cluster.generation in (Generation.blackwell, Generation.blackwell_ultra)
    return turns and kernels_of(run).fp8_weights and beyond_of(run).products is Products.fp8


def moment_bytes(run: RunConfig) -> int:
    """Bytes of one element of a moment."""
    return 2 if beyond_of(run).moments is Dtype.bf16 else 4


def product_bytes(run: RunConfig, value_bytes: int) -> int:
    """Bytes of one element of a product's input as it is kept; the scales of mxfp8, 3% more, are left out."""
    return value_bytes if beyond_of(run).products is None else 1


def products_peak(plan: PlanConfig) -> float:
    """Dense FLOP/s of one device in what products are multiplied in. Raises: ConfigError where it has no such units."""
    asked, cluster = plan.beyond.products, plan.cluster
    if asked is None:
        return cluster.peak_flops(plan.precision.dtype)
    if cluster.peak_flops_fp8 is None:
        raise ConfigError(
            f"beyond.products={asked.value}: a device of cluster={cluster.name} has no fp8.",
            "Leave beyond.products out, or choose a cluster that has: cluster=h100_80g.",
        )
    if asked is Products.mxfp8 and cluster.generation not in _HAS_MXFP8:
        raise ConfigError(
            f"beyond.products=mxfp8: {cluster.generation.value} has no scales for 32 elements.",
            "Set beyond.products=fp8, or choose a cluster that has: cluster=b200.",
        )
    return cluster.peak_flops_fp8


def unbuilt(plan: PlanConfig) -> list[str]:
    """Those settings of a plan that are another stack's or no stack's here: the trainer cannot build them."""
    other = [] if plan.stack is None else [f"stack={plan.stack}"]
    return [*other, *plan.beyond.asked()]


def plan_interval(plan: PlanConfig) -> ErrorInterval | None:
    """How far off the time of a plan may be; None: not known. No row is in fp32, and a time_factor that was measured
    is another prediction than the rows had."""
    if plan.precision.dtype is Dtype.fp32 or plan.time_factor != 1:
        return None
    kind = "experts" if plan.model.moe is not None else "dense"
    precision = "bf16" if plan.beyond.products is None else "fp8"
    stack, generation = plan_stack(plan), plan.cluster.generation
    if stack is None:
        return error_interval(generation, has_experts=kind == "experts", precision=precision)
    return _of_dispatch(plan, stack.interval(generation, kind, precision))


def _of_dispatch(plan: PlanConfig, found: ErrorInterval | None) -> ErrorInterval | None:
    """The interval of a stack, widened to rows that had the dispatcher of beyond.dispatch where that is another one."""
    asked, is_tuned = plan.beyond.dispatch, PROFILES[f"{plan.stack}/{plan.cluster.generation.value}"].is_tuned
    if found is None or asked in (None, Dispatch.tuned if is_tuned else Dispatch.plain):
        return found
    rows, least, most = MISSED_DISPATCH[asked]
    of = f"{found.of}; widened to {rows} rows whose dispatch was {asked.value}"
    return replace(found, of=of, least=min(least, found.least), most=max(most, found.most))
