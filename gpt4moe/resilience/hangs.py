"""What the ranks of a launch say of themselves (Beat), and who stopped them (told). No torch.

A rank's watchdog posts a beat every moment. When nothing moves, one rank reads all beats and tells in two lines which
rank the others wait for, and in what they wait.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Self

from gpt4moe.config.resilience import HANG_PATIENCE, ResilienceConfig
from gpt4moe.parallel.layout import ranks_text
from gpt4moe.resilience.standing import Place

_LOST_SECONDS = 30.0
"""Between steps no more is waited for a silent rank, unless steps take long."""
_LEAST_SHARE = 0.1
"""Of a rank's own work: ranks that nearly always wait are not compared."""
_NAMED = 4
"""Ranks or places that a line names; it counts the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What one rank last said of itself."""

    number: int
    """Of its beats. One that does not grow is of a rank that is stopped, lost or blocked."""
    node: str
    step: int
    """Steps done."""
    doing: str = ""
    """start_up, checkpoint, evaluation, ...; empty: a step."""
    still_seconds: float = 0.0
    """Since its training thread moved."""
    idle_seconds: float = 0.0
    """Since its last step ended, or a pause after it began or ended."""
    allowed_seconds: float = float("inf")
    """Limits.allowed of what it does."""
    lookout_seconds: float = float("inf")
    """Limits.lookout of what it does."""
    busy_share: float = 1.0
    """Share of the last minute in which its training thread was in no collective."""
    place: Place = field(default_factory=Place)
    """Known once it has not moved for a while."""

    def encode(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        fields = json.loads(text)
        return cls(**{**fields, "place": Place(**fields["place"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """Why every rank of a launch ends, as one of them says."""

    rank: int
    """Who says so: of two ranks that found the same at once, one prints it."""
    status: int
    lines: list[str]
    writes_stacks: bool = False
    grace_seconds: float = 2.0
    """In which a rank may end by itself, with its own error."""
    is_shared: bool = False
    """Whether every rank should have this error, and end by itself."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a launch may stand still, in seconds."""

    hang_seconds: float
    """resilience.hang_seconds; 0: for ever."""

    @classmethod
    def of(cls, settings: ResilienceConfig) -> Self:
        return cls(hang_seconds=settings.hang_seconds)

    def allowed(self, doing: str, *, longest_step: float, longest_wait: float) -> float:
        """Without a move of any rank.

        Args:
            doing: as in a beat.
            longest_step: of this launch, in seconds; 0: none yet.
            longest_wait: the longest of what it does before.
        """
        if not self.hang_seconds:
            return float("inf")
        least = HANG_PATIENCE * self.hang_seconds if doing else self.hang_seconds
        return max(least, 3 * longest_step, 2 * longest_wait if doing else 0.0)

    def lookout(self, doing: str, *, longest_step: float, longest_wait: float) -> float:
        """The same where a rank sends no beats."""
        allowed = self.allowed(doing, longest_step=longest_step, longest_wait=longest_wait)
        return allowed if doing else min(allowed, max(_LOST_SECONDS, 2 * longest_step))


def why_hung(beats: Iterable[Beat], *, is_rank_lost: bool, slack: float) -> str:
    """How `told` begins, where the ranks that send beats hang; empty where they do not. Each is judged by the limit of
    what it does itself. No rank: no verdict.

    Args:
        is_rank_lost: another rank sends no beats: between steps that is waited for more shortly.
        slack: seconds by which a beat may be old.
    """
    live = list(beats)
    if not live:
        return ""
    if all(
        beat.still_seconds >= (beat.lookout_seconds if is_rank_lost else beat.allowed_seconds) - slack for beat in live
    ):
        return f"Nothing has moved for {min(beat.still_seconds for beat in live):.0f} s"
    if not is_rank_lost and all(beat.idle_seconds >= HANG_PATIENCE * beat.allowed_seconds for beat in live):
        return f"Ranks move, but no step has ended for {min(beat.idle_seconds for beat in live):.0f} s"
    return ""


def told(beats: Mapping[int, Beat], silent: Collection[int], *, what: str) -> list[str]:
    """Two lines: who stopped, and in what the others wait.

    Args:
        beats: of every rank that ever sent one.
        silent: ranks that send none any more.
        what: of `why_hung`.
    """
    outside = [rank for rank, beat in beats.items() if rank not in silent and not beat.place.collective]
    stopped = [*sorted(silent), *outside] if silent else outside
    kinds = defaultdict(list)
    for rank, beat in beats.items():
        if rank not in silent and beat.place.collective:
            kinds[beat.place.collective, beat.place.group, beat.step].append(rank)
    if silent:
        who = f"{_silent(beats, silent)}: stopped, killed, lost with the node, or blocked"
        if outside:
            who += f"; {_outside(beats, outside)}"
    elif outside:
        who = _outside(beats, outside)
    elif len(kinds) == 2 and len(fewest := min(kinds.values(), key=len)) == 1 < len(beats) - 1:
        stopped = fewest
        who = f"{ranks_text(fewest)} is in another collective than the others: {_where(beats, fewest)}"
    elif len(kinds) > 1:
        who = "no rank is outside a collective, but they wait in different ones"
    else:
        who = "every rank is in the same collective: a device or the network stands still"
    others = [rank for rank in sorted(beats) if rank not in stopped] or sorted(beats)
    return [f"{what}: {who}.", f"Where they wait: {_where(beats, others)}."]


def busiest(beats: Mapping[int, Beat], like: Callable[[int], int]) -> tuple[int, float] | None:
    """The rank that waits least for others, and its own work over the median of the others of its kind; None where no
    rank has another of its kind.

    Args:
        like: rank -> its kind: ranks of one pipeline stage have the same work.
    """
    kinds: dict[int, list[int]] = defaultdict(list)
    for rank in beats:
        kinds[like(rank)].append(rank)
    ratios = {}
    for ranks in kinds.values():
        if len(ranks) > 1:
            rank = max(ranks, key=lambda rank: beats[rank].busy_share)
            others = median(beats[other].busy_share for other in ranks if other != rank)
            ratios[rank] = beats[rank].busy_share / max(others, _LEAST_SHARE)
    return max(ratios.items(), key=lambda item: item[1]) if ratios else None


def lost(beats: Mapping[int, Beat], silent: Collection[int]) -> str:
    """One line of ranks that are gone while others lost the connection."""
    return f"{_silent(beats, silent)}: killed, or lost with the node."


def _silent(beats: Mapping[int, Beat], ranks: Collection[int]) -> str:
    nodes = sorted({beats[rank].node for rank in ranks if rank in beats})
    step = min((beats[rank].step for rank in ranks if rank in beats), default=0)
    on = f" on {', '.join(nodes[:_NAMED])}" if nodes else ""
    sends = "send" if len(ranks) > 1 else "sends"
    return f"{ranks_text(ranks)}{on} {sends} no heartbeat any more (the last was after step {step})"


def _outside(beats: Mapping[int, Beat], ranks: list[int]) -> str:
    is_are = "are" if len(ranks) > 1 else "is"
    nodes = ", ".join(sorted({beats[rank].node for rank in ranks})[:_NAMED])
    return f"{ranks_text(ranks)} on {nodes} {is_are} in no collective: {_where(beats, ranks)}"


def _where(beats: Mapping[int, Beat], ranks: Collection[int]) -> str:
    """Each place with its ranks, the most frequent first."""
    places: dict[Any, list[int]] = defaultdict(list)
    for rank in ranks:
        beat = beats[rank]
        during = f"{beat.doing.replace('_', '-')}, after step {beat.step}" if beat.doing else f"step {beat.step + 1}"
        places[during, beat.place.words or "a place that is not known"].append(rank)
    most = sorted(places.items(), key=lambda item: (-len(item[1]), item[1]))
    texts = [f"{ranks_text(of)} in {during}, {words}" for (during, words), of in most[:_NAMED]]
    more = f"; {len(most) - _NAMED} more places" if len(most) > _NAMED else ""
    return "; ".join(texts) + more
