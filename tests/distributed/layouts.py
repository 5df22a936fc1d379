"""The table of layouts that every promise is tested on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayoutCase:
    """Ranks and overrides on top of the tiny test model (case.BASE)."""

    world_size: int
    overrides: tuple[str, ...]
    """The layout."""
    model: tuple[str, ...] = ()
    """What the layout needs of the model; one process gets it too."""
    batch: tuple[str, ...] = ()
    """A step's sequences, where those of the tiny model are too few for three micro-batches a rank."""

    @property
    def shared(self) -> tuple[str, ...]:
        """What one process gets too."""
        return (*self.model, *self.batch)


def _case(world_size: int, num_layers: int = 4, sequences: int = 12, **degrees: int) -> LayoutCase:
    return LayoutCase(
        world_size,
        tuple(f"parallel.{name}={size}" for name, size in degrees.items()),
        () if num_layers == 4 else (f"model.num_layers={num_layers}",),
        () if sequences == 12 else (f"training.global_batch_size={sequences}",),
    )


LAYOUTS = {
    "dp2": _case(2),
    "dp3": _case(3, sequences=18),
    "tp2": _case(2, tp=2),
    "pp2": _case(2, pp=2),
    "pp4": _case(4, pp=4),
    "pp2-vpp2": _case(2, pp=2, vpp=2),
    "pp4-vpp2": _case(4, num_layers=8, sequences=16, pp=4, vpp=2),
    "dp2-ep2": _case(2, ep=2),
    "tp2-ep2": _case(2, tp=2, ep=2),
    "pp2-dp2-ep2": _case(4, pp=2, ep=2),
    "tp2-pp2-ep2": _case(4, tp=2, pp=2, ep=2),
    "tp2-dp2-ep4": _case(4, tp=2, ep=4),
    "dp2-etp2": _case(2, etp=2),
    "tp2-dp2-ep2-etp2": _case(4, tp=2, ep=2, etp=2),
    "cp2": _case(2, cp=2),
    "pp2-cp2-ep2": _case(4, pp=2, cp=2, ep=2),
    "tp2-cp2-ep2-etp2": _case(4, tp=2, cp=2, ep=2, etp=2),
    "tp2-pp2-vpp2-ep2": _case(4, tp=2, pp=2, vpp=2, ep=2),
    "pp2-vpp2-cp2-etp2": _case(4, pp=2, vpp=2, cp=2, etp=2),
}
