"""The MFU ceiling: what a GPU of a cluster could reach with these kernels, if nothing but they took time.

kernels --max(bytes / bandwidth, FLOPs / peak, launch)--> seconds --> model FLOPs / (seconds x peak)

It is computed from data sheets and the shares of Assumptions, never measured. Communication, host waits and gaps
between kernels are not in it, so a real step is slower.
"""

from dataclasses import asdict, dataclass, field

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.kernel_problems import DeviceKind
from gpt4moe.parallel.layout import Layout

ENOUGH_SECONDS = 3e-5
"""Of kernels that are queued behind what the host waits for: the GPU has work until the host has queued the next. Ten
of the shortest; not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Shares of the data sheet's figures that kernels are assumed to reach. Stated, not measured by this project."""

    memory: float = 0.85
    """Of the memory bandwidth."""
    dense: float = 0.72
    """Of the peak, in products of large dense matrices."""
    grouped: float = 0.60
    """Of the peak, in torch's grouped products of experts."""
    triton: float = 0.50
    """Of the peak, in our Triton kernel of their weights' gradients, which was tuned on no GPU."""
    flash: float = 0.36
    """Of the peak, in torch's flash attention (FlashAttention 2 on Hopper; cuDNN's is nearer 0.55)."""
    kernel_seconds: float = 3e-6
    """No kernel is shorter."""

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Assumptions":
        """FlashAttention 2 was written for Ampere: 50 to 73% of an A100's peak (arXiv:2307.08691, section 4.1)."""
        is_older = DeviceKind.of_cluster(cluster).capability < (9, 0)
        return cls(flash=0.60) if is_older else cls()

    def __str__(self) -> str:
        return (
            f"{self.memory:.0%} of the memory bandwidth; {self.dense:.0%} of the peak in dense products, "
            f"{self.grouped:.0%} in grouped ones ({self.triton:.0%} of their weights' gradients where our kernel makes "
            f"them), {self.flash:.0%} in flash attention; {self.kernel_seconds * 1e6:g} "
            "us a kernel at least; no communication, no host waits"
        )


@dataclass(slots=True)
class Part:
    """A part of a step."""

    kernels: int = 0
    memory_bytes: float = 0.0
    flops: float = 0.0
    bound_seconds: float = 0.0
    """By the assumptions, not measured."""


@dataclass(slots=True)
class Roofline:
    """Sums the kernels of one step, part by part."""

    peak_flops: float
    memory_bytes_per_second: float
    assumptions: Assumptions = field(default_factory=Assumptions)
    parts: dict[str, Part] = field(default_factory=dict)
    kernels: dict[str, Part] = field(default_factory=dict)
    """The same by operation."""

    @classmethod
    def of(cls, run: RunConfig) -> "Roofline":
        cluster = run.cluster
        return cls(cluster.peak_flops(run.precision.dtype), cluster.memory_bytes_per_second, Assumptions.of(cluster))

    def add(self, operation: str, part: str, memory_bytes: float, flops: float) -> None:
        """Counts one kernel."""
        assumed = self.assumptions
        share = assumed.dense
        if operation.startswith("triton"):
            share = assumed.triton
        elif "grouped" in operation:
            share = assumed.grouped
        elif "flash" in operation:
            share = assumed.flash
        seconds = max(
            assumed.kernel_seconds,
            memory_bytes / (self.memory_bytes_per_second * assumed.memory),
            flops / (self.peak_flops * share),
        )
        for sums, key in ((self.parts, part), (self.kernels, operation)):
            row = sums.setdefault(key, Part())
            row.kernels += 1
            row.memory_bytes += memory_bytes
            row.flops += flops
            row.bound_seconds += seconds

    def clear(self) -> None:
        self.parts.clear()
        self.kernels.clear()

    @property
    def bound_seconds(self) -> float:
        return sum(part.bound_seconds for part in self.parts.values())

    def with_bubble(self, run: RunConfig, layout: Layout, schedule_seconds: float) -> None:
        """Adds the waits of a pipeline's stages, as if all stages took as long as this rank's.

        Args:
            schedule_seconds: of the kernels of the forward and backward passes.
        """
        if layout.pp > 1:
            micro_batches = run.training.global_batch_size // run.training.micro_batch_size // layout.dp
            share = (layout.pp - 1) / (micro_batches * layout.vpp)
            self.parts["pipeline bubble"] = Part(bound_seconds=schedule_seconds * share)

    def mfu(self, run: RunConfig, layout: Layout) -> float:
        """Model FLOPs of the step's share of one device, over what its peak allows in the bound; 0 without kernels."""
        tokens = run.training.global_batch_size * run.model.seq_length / layout.world_size
        seconds = self.bound_seconds
        return flops_per_token(run.model).model * tokens / (seconds * self.peak_flops) if seconds else 0.0

    def as_data(self) -> dict[str, dict[str, float]]:
        """The parts, longest first."""
        rows = sorted(self.parts.items(), key=lambda row: -row[1].bound_seconds)
        return {name: asdict(part) for name, part in rows}
