"""Facts of one accelerator of a cluster: what MFU, the planner and Slurm read."""

from dataclasses import dataclass

from gpt4moe.config.missing import MISSING


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    name: str = MISSING
    peak_flops_bf16: float = MISSING
    """Dense bf16 FLOP/s of one device, from its data sheet."""
    peak_flops_fp32: float = MISSING
    """Dense fp32 FLOP/s of one device."""
    memory_bytes: float = MISSING
    """Of one device."""
    devices_per_node: int = 8
