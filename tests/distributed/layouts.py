"""The table of layouts that every promise is tested on."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayoutCase:
    """Ranks and overrides on top of the tiny test model (case.BASE)."""

    world_size: int
    overrides: tuple[str, ...] = field(default=())


def _case(world_size: int, **degrees: int) -> LayoutCase:
    return LayoutCase(world_size, tuple(f"parallel.{name}={size}" for name, size in degrees.items()))


LAYOUTS = {
    "dp2": _case(2),
    "dp3": _case(3),
    "tp2": _case(2, tp=2),
    "pp2": _case(2, pp=2),
    "pp4": _case(4, pp=4),
    "pp2-vpp2": _case(2, pp=2, vpp=2),
    "pp4-vpp2": _case(4, pp=4, vpp=2),
    "dp2-ep2": _case(2, ep=2),
    "tp2-ep2": _case(2, tp=2, ep=2),
    "pp2-dp2-ep2": _case(4, pp=2, ep=2),
    "tp2-pp2-ep2": _case(4, tp=2, pp=2, ep=2),
    "tp2-dp2-ep4": _case(4, tp=2, ep=4),
}
