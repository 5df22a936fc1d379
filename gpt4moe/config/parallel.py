"""How ranks share the work. The data-parallel size is what the world leaves; parallel/layout.py has the arithmetic."""

from dataclasses import dataclass
from enum import Enum

from gpt4moe.errors import ConfigError


class Recompute(str, Enum):
    """Which activations are computed again in the backward pass instead of kept."""

    none = "none"
    full = "full"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    tp: int = 1
    """Tensor parallel: every matrix of a layer cut over this many ranks."""
    pp: int = 1
    """Pipeline parallel: layers cut into this many stages."""
    vpp: int = 1
    """Virtual stages of a rank (interleaved schedule); 1: plain 1F1B."""
    cp: int = 1
    """Context parallel: a sequence cut over this many ranks."""
    ep: int = 1
    """Expert parallel: experts of a layer spread over this many ranks, out of tp x cp x dp."""
    etp: int = 1
    """Expert tensor parallel: each expert cut over this many ranks."""
    sequence_parallel: bool | None = None
    """Activations between layers cut over tp along the sequence; null: on when tp > 1."""
    layers_per_stage: list[int] | None = None
    """Layers of each stage, pp * vpp entries in model order; null: as even as it goes, larger stages first."""
    recompute: Recompute = Recompute.none

    @property
    def sequence_parallel_on(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel and self.tp > 1

    def validate(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"parallel.{name}={getattr(self, name)} is below 1.", f"Set parallel.{name}=1 or more."
                )
