"""The group parallel: how ranks share the work. dp follows from the number of ranks (parallel/layout.py)."""

from dataclasses import dataclass
from enum import Enum

from gpt4moe.errors import ConfigError


class Recompute(str, Enum):
    """Which activations the backward pass computes again, instead of keeping them from the forward pass.

    none. selective: the core attention. moe: all from the router to the sum over experts. full: whole layers.
    """

    none = "none"
    selective = "selective"
    moe = "moe"
    full = "full"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    tp: int = 1
    """Tensor parallel: each matrix of a layer is cut over this many ranks."""
    pp: int = 1
    """Pipeline parallel: the layers are divided into this many stages."""
    vpp: int = 1
    """Virtual stages of a rank (interleaved schedule); 1: plain 1F1B."""
    cp: int = 1
    """Context parallel: each sequence is cut over this many ranks."""
    ep: int = 1
    """Expert parallel: the experts of a layer are divided among this many ranks, out of tp x cp x dp."""
    etp: int = 1
    """Expert tensor parallel: each expert is cut over this many ranks."""
    sequence_parallel: bool | None = None
    """Activations between layers are cut over tp along the sequence; null: if tp > 1."""
    layers_per_stage: list[int] | None = None
    """Layers of each stage, pp * vpp entries in model order; null: as even as possible, larger stages first."""
    embedding_counts_as_layer: bool = False
    """The embedding counts as a layer: the first stage has one layer less."""
    head_counts_as_layer: bool = False
    """The output layer and the loss count as a layer: the last stage has one layer less."""
    recompute: Recompute = Recompute.none
    recompute_layers: int | None = None
    """With recompute=full: how many layers of each virtual stage are recomputed, the first ones; null: all."""

    @property
    def sequence_parallel_on(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel and self.tp > 1

    def validate(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"parallel.{name}={getattr(self, name)} is below 1.", f"Set parallel.{name}=1 or more."
                )
        counts = (self.embedding_counts_as_layer, self.head_counts_as_layer)
        if self.layers_per_stage is not None and any(counts):
            raise ConfigError(
                f"parallel.layers_per_stage={self.layers_per_stage} and embedding_counts_as_layer={counts[0]}, "
                f"head_counts_as_layer={counts[1]} both say how many layers a stage has.",
                "Set parallel.layers_per_stage=null, or parallel.embedding_counts_as_layer=false and "
                "parallel.head_counts_as_layer=false.",
            )
        if self.recompute_layers is not None and (self.recompute is not Recompute.full or self.recompute_layers < 1):
            raise ConfigError(
                f"parallel.recompute_layers={self.recompute_layers} with parallel.recompute={self.recompute.value}: it "
                "counts the layers of a stage that full recompute takes, 1 or more.",
                "Set parallel.recompute=full, or parallel.recompute_layers=null.",
            )
