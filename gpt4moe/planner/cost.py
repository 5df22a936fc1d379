"""Money and energy of a run: device hours times the cluster's price and power."""

from dataclasses import dataclass

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    usd: float
    gpu_hours: float
    kwh: float | None
    """Of the devices with their servers, not of the hall's cooling; None: the cluster's power is not known."""


def cost(cluster: ClusterConfig, devices: int, hours: float) -> Cost:
    """Of `devices` for `hours`. Raises: ConfigError where the cluster has no price."""
    gpu_hours = devices * hours
    kwh = None if cluster.watts is None else gpu_hours * cluster.watts / 1000
    return Cost(usd=gpu_hours * hourly_price(cluster), gpu_hours=gpu_hours, kwh=kwh)


def hourly_price(cluster: ClusterConfig) -> float:
    """USD of one device for one hour. Raises: ConfigError where none is known."""
    if cluster.usd_per_hour is None:
        raise ConfigError(
            f"cluster={cluster.name} has no price (cluster.usd_per_hour is null).",
            "Set cluster.usd_per_hour to what you pay for a device and hour; configs/cluster has 1.10 for a100_80g, "
            "2.50 for h100_80g, 4.54 for gb200.",
        )
    return cluster.usd_per_hour
