"""The group cluster: facts of one device, for MFU, the planner and costs.

A cluster is one YAML file of configs/cluster. The file names the source of each fact.
"""

from dataclasses import dataclass
from enum import Enum
from math import inf

from gpt4moe.config import MISSING
from gpt4moe.config.optimizer import Dtype
from gpt4moe.errors import ConfigError


class Generation(str, Enum):
    """Hardware generation of the devices. Each has a row of GENERATIONS in planner/efficiency.py."""

    ampere = "ampere"
    ada = "ada"
    hopper = "hopper"
    blackwell = "blackwell"
    blackwell_ultra = "blackwell_ultra"
    cdna3 = "cdna3"
    cdna4 = "cdna4"
    cpu = "cpu"

    @property
    def is_amd(self) -> bool:
        """Runs ROCm instead of CUDA."""
        return self in (Generation.cdna3, Generation.cdna4)


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    name: str = MISSING
    generation: Generation = MISSING
    """Decides which share of the peak the planner expects, and which kernels run."""
    devices: int | None = None
    """Devices of a planned run; null: the fewest that the layout allows. Training uses the ranks that were launched."""
    peak_flops_bf16: float = MISSING
    """Dense bf16 FLOP/s of one device, from its data sheet."""
    peak_flops_fp8: float | None = None
    """Dense fp8 FLOP/s of one device; null: the device has no fp8."""
    peak_flops_fp32: float = MISSING
    """Dense fp32 FLOP/s of one device."""
    memory_bytes: float = MISSING
    """Bytes of a device's memory that a process can use."""
    memory_bytes_per_second: float = MISSING
    """Bandwidth between a device and its own memory."""
    nvlink_bytes_per_second: float = MISSING
    """Bandwidth from one device to the others of its NVLink domain, one direction."""
    fabric_bytes_per_second: float = MISSING
    """Bandwidth from one device to other domains, one direction: its share of the node's network ports."""
    devices_per_node: int = 8
    devices_per_nvlink_domain: int = 8
    """Devices connected by NVLink: 8 on an HGX board, 72 in an NVL72 rack."""
    usd_per_hour: float | None = None
    """Price of one device for one hour; null: not known, so plans leave money out, and a budget is refused."""
    watts: float | None = None
    """Power of one device with its share of the server; null: not known."""
    hours_between_failures: float | None = None
    """Device hours between two unexpected stops of a run; null: the planner ignores failures."""

    def peak_flops(self, dtype: Dtype) -> float:
        """Dense FLOP/s of one device in `dtype`."""
        return self.peak_flops_bf16 if dtype is Dtype.bf16 else self.peak_flops_fp32

    def validate(self) -> None:
        for name in (
            "devices", "peak_flops_bf16", "peak_flops_fp8", "peak_flops_fp32", "memory_bytes",
            "memory_bytes_per_second", "nvlink_bytes_per_second", "fabric_bytes_per_second", "devices_per_node",
            "devices_per_nvlink_domain", "usd_per_hour", "watts", "hours_between_failures",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(
                    f"cluster.{name}={value:g} is no number above 0.",
                    f"Set cluster.{name}, or choose a cluster of configs/cluster: cluster=h100_80g.",
                )
