"""How much of its peak a device reaches: a few constants for each software stack and hardware generation.

    published runs (benchmarks/planner_error.yaml) --fit--> PROFILES --GENERATIONS--> layer_time, step_time -> seconds

The four shares below hold for every stack; they are stated, not fitted. The constants of a profile are fitted: three
for a dense stack, five for a stack with mixtures of experts. `python -m benchmarks.planner_error fit` fits them again;
docs/planner-error.md has every row with its error. To add a GPU generation: a value of config.cluster.Generation, and a
row of GENERATIONS.
"""

from dataclasses import dataclass, replace

from gpt4moe.config.cluster import Generation
from gpt4moe.errors import ConfigError

ATTENTION_SHARE = 0.4
"""Share of the bf16 peak that fused attention reaches on causal scores, forward and backward together."""
RING_SHARE = 0.8
"""Share of a link's bandwidth that all-gathers and reduce-scatters reach."""
ALL_TO_ALL_SHARE = 0.6
"""Share of a link's bandwidth that all-to-alls reach: they send many small messages."""
TUNED_ALL_TO_ALL_SHARE = 0.8
"""The same of a tuned dispatch. DeepEP's README at 0297fc80 measured 726 of an NVLink's 900 GB/s, and over four nodes
61 GB/s, of which three quarters leave, of a port's 50."""
HIDDEN_SHARE = 0.72
"""Share of the rows' travel that an overlapped dispatch hides behind another micro-batch. Qwen3-30B on 16 H100 over
HybridEP took 3.7 s less a step, of 5.1 s that are counted for its travel here; without overlap 0.1% of it was hidden
(Megatron-Bridge's skill nemo-mbridge-perf-moe-comm-overlap at 067f987df). Other pairs: docs/planner-error.md."""
MEMORY_SHARE = 0.8
"""Share of the memory bandwidth that element-wise kernels reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """The constants of one software stack on one hardware generation."""

    matrix: float
    """Share of the peak that products of large matrices reach, 0 to 1."""
    exposed: float
    """Share of tensor- and context-parallel communication, and of messages between stages, that no computation hides, 0
    to 1. Of expert-parallel communication none is hidden (HIDDEN_SHARE has the exception and a measurement)."""
    copy_passes: float
    """How often a row that is sent to an expert passes through memory, forward: permuting, padding, casting."""
    moe_layer_seconds: float = 0.0
    """Kernel launches and waits of a MoE layer, forward; twice that backward."""
    score_passes: float = 0.0
    """How often attention scores pass through memory, forward: 0 where attention is fused (flash attention)."""
    is_tuned: bool = False
    """Whether a token is sent once to a rank, and once to an NVLink domain, that has several of its experts (DeepEP,
    HybridEP)."""
    hides_experts: bool = False
    """Whether one micro-batch computes while another's rows travel to their experts and back (Megatron-core's
    overlap_moe_expert_parallel_comm), where the layout lets it: step_time.overlapped."""
    gathers_copies: bool = False
    """Expert tensor parallelism: routed rows are gathered after the all-to-all (Megatron-core's dispatcher); else
    tokens are gathered before routing, and every rank of the group sends its rows (ours)."""
    gradient_bytes: int = 4
    """Of one gradient that data-parallel ranks exchange."""


_CORE_HOPPER = Efficiency(
    matrix=0.69, exposed=1.0, copy_passes=14.3, moe_layer_seconds=2.9e-4, gathers_copies=True, gradient_bytes=2
)
_BRIDGE = Efficiency(
    matrix=0.64, exposed=0.05, copy_passes=3.9, moe_layer_seconds=8.8e-4, is_tuned=True, gradient_bytes=2
)
PROFILES: dict[str, Efficiency] = {
    # Unfused attention: scores written; softmax reads and writes; dropout reads, writes, masks; read: 6.5 passes.
    "megatron-lm-2022/ampere": Efficiency(matrix=0.70, exposed=0.31, copy_passes=0, score_passes=6.5),
    "llama3-2024/hopper": Efficiency(matrix=0.54, exposed=0.56, copy_passes=0),
    "megatron-core-2025/hopper": _CORE_HOPPER,
    # Not fitted: products of large matrices reach 620 of 1,307 TFLOP/s on MI300X and 720 of 989 on H100 (SemiAnalysis,
    # 2024-12-22, bf16), so the share is Hopper's 0.69 x 0.474 / 0.728.
    "megatron-core-2025/cdna3": replace(_CORE_HOPPER, matrix=0.45),
    "megatron-bridge-26.04/hopper": _BRIDGE,
    "megatron-bridge-26.04/blackwell": replace(_BRIDGE, matrix=0.55),
    "megatron-bridge-26.04/blackwell_ultra": replace(_BRIDGE, matrix=0.66),
}
""""<stack>/<generation>" -> constants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationTiming:
    """How a plan on one hardware generation is timed, and how far off that may be."""

    profile: str
    """Key of PROFILES: the nearest measured stack, whose constants a plan takes."""
    constants: str
    """Where these constants come from, as every plan says it; empty for CPUs, whose figures are nominal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorInterval:
    """How published rows of one kind were predicted by constants of another source: predicted / published - 1."""

    of: str
    rows: int
    least: float
    """The row that was predicted fastest of all, against what it took: below 0, too fast."""
    most: float
    """The row that was predicted slowest: above 0, too slow."""

    def around(self, predicted: float) -> tuple[float, float]:
        """What a prediction (seconds, days, USD) may turn out as, if it errs as far as those rows."""
        return predicted / (1 + self.most), predicted / (1 + self.least)

    def around_price(self, usd: float) -> tuple[float, float]:
        """What a price of tokens may turn out as, where the rows are throughputs: it grows as they fall."""
        return usd * (1 + self.least), usd * (1 + self.most)


_CORE = "megatron-core-2025/hopper"
_HOPPER = "fitted to 64 rows of one paper on H100 (Megatron-Core 2025)"
_NONE = f"Hopper's, {_HOPPER}: no row of any stack on this generation was used"
_AMD = f"{_NONE}; the share of the peak is that of products measured on MI300X"
_BLACKWELL = f"Hopper's, {_HOPPER}: no row of that stack on Blackwell was found"
GENERATIONS = {
    Generation.ampere: GenerationTiming(
        profile="megatron-lm-2022/ampere",
        constants="fitted to 9 dense rows of one paper on A100 (Megatron-LM 2022), those of experts to rows on H100",
    ),
    Generation.hopper: GenerationTiming(profile=_CORE, constants=_HOPPER),
    Generation.blackwell: GenerationTiming(profile=_CORE, constants=_BLACKWELL),
    Generation.blackwell_ultra: GenerationTiming(profile=_CORE, constants=_BLACKWELL),
    Generation.ada: GenerationTiming(profile=_CORE, constants=_NONE),
    Generation.cdna3: GenerationTiming(profile="megatron-core-2025/cdna3", constants=_AMD),
    Generation.cdna4: GenerationTiming(profile="megatron-core-2025/cdna3", constants=_AMD),
    Generation.cpu: GenerationTiming(profile=_CORE, constants=""),
}  # fmt: skip
"""One row for each generation. A new one starts with the profile of its nearest relative."""
PREDICTED: dict[tuple[Generation, str, str], tuple[int, float, float]] = {
    (Generation.ampere, "dense", "bf16"): (9, 0.018, 0.220),
    (Generation.hopper, "dense", "bf16"): (3, -0.255, -0.106),
    (Generation.hopper, "dense", "fp8"): (2, 0.176, 0.279),
    (Generation.hopper, "experts", "bf16"): (5, -0.286, 0.129),
    (Generation.hopper, "experts", "fp8"): (2, -0.083, 0.116),
    (Generation.blackwell, "dense", "fp8"): (3, -0.101, 0.141),
    (Generation.blackwell, "experts", "bf16"): (2, -0.292, -0.236),
    (Generation.blackwell, "experts", "fp8"): (6, -0.198, 0.094),
    (Generation.blackwell_ultra, "dense", "fp8"): (3, 0.014, 0.270),
    (Generation.blackwell_ultra, "experts", "bf16"): (2, -0.285, -0.126),
    (Generation.blackwell_ultra, "experts", "fp8"): (6, -0.096, 0.253),
}
"""(generation, kind of model, precision) -> published rows of other sources than the constants' own, and the least and
the most of their signed errors under those constants, as `python -m benchmarks.planner_error` prints them."""
FEWEST_ROWS = 3
"""Fewer rows say little: those of the other precision are taken with them."""


def error_interval(generation: Generation, *, has_experts: bool, precision: str = "bf16") -> ErrorInterval | None:
    """How far off a plan may be; None: no row is known. Args: precision: of products, bf16 or fp8.

    Models with experts on Ampere have Hopper's constants and no row: Hopper's rows are taken.
    """
    kind = "experts" if has_experts else "dense"
    if has_experts and generation is Generation.ampere:
        generation = Generation.hopper
    for asked in ((precision,), ("bf16", "fp8")):
        precisions = [one for one in asked if (generation, kind, one) in PREDICTED]
        cells = [PREDICTED[generation, kind, one] for one in precisions]
        rows = sum(cell[0] for cell in cells)
        if rows >= FEWEST_ROWS:
            return ErrorInterval(
                of=f"{'models with experts' if has_experts else 'dense models'} on {generation.value}, "
                f"{' and '.join(precisions)}",
                rows=rows, least=min(cell[1] for cell in cells), most=max(cell[2] for cell in cells),
            )  # fmt: skip
    return None


def generation_timing(generation: Generation) -> GenerationTiming:
    """The row of a generation. Raises: ConfigError where it has none."""
    if generation not in GENERATIONS:
        raise ConfigError(
            f"cluster.generation={generation.value} has no row in GENERATIONS (gpt4moe/planner/efficiency.py), so a "
            "plan does not know how much of its peak it reaches.",
            f"Add the row, or set cluster.generation to one of {', '.join(known.value for known in GENERATIONS)}.",
        )
    return GENERATIONS[generation]


def planning_profile(generation: Generation) -> Efficiency:
    """The constants that a plan of this trainer takes: the nearest measured stack's, as no run of ours on a GPU has
    been measured. Raises: ConfigError for a generation without a row.

    Attention is fused, gradients travel in fp32. What the rows of a dense stack say nothing of is taken from the stack
    with most rows that have experts: it hides no expert-parallel communication. Neither do we: the layer waits for it.
    """
    profile, with_experts = PROFILES[generation_timing(generation).profile], PROFILES[_CORE]
    return replace(
        profile,
        copy_passes=profile.copy_passes or with_experts.copy_passes,
        score_passes=0.0,
        gathers_copies=False,
        gradient_bytes=4,
    )
