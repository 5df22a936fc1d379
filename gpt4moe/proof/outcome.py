"""outcome: puts the answers of all ranks together as logical tensors, and lists what does not fit. numpy, no torch.

of a rank      rectangles of the gradients, masters and moments that it owns; digests of the weights it computes with
of all ranks   whole tensors; problems: elements with no owner or several, copies of a weight that are not equal
"""

from dataclasses import dataclass, field

import numpy as np

# The parts of a layer in the order of its forward pass; the embedding is before the first layer, the loss behind the
# last. slots: which assignments of tokens to experts are kept; experts: what comes back from the routed ones.
EMBEDDING_LAYER = -1
PARTS = ("embedding", "input", "attention", "router", "choice", "slots", "experts", "shared experts", "mlp", "output",
         "token loss")  # fmt: skip
LOSS_PARTS = ("load-balancing loss", "z-loss")
Place = tuple[int, str]
"""Layer and part."""
GRADIENT, WEIGHT, BUFFER, START = "gradient", "weight", "buffer", "start"


def gradient_kind(step: int) -> str:
    """Kind of the gradients of `step`, from 1."""
    return GRADIENT if step == 1 else f"{GRADIENT} of step {step}"


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A rectangle of a logical tensor, fp32, owned by one rank."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class WeightCopy:
    """A weight or buffer as one rank computes with it; ranks with the same rectangle must hold the same bits."""

    name: str
    offset: tuple[int, ...]
    digest: bytes
    cut: str
    """How ranks divide it, in words."""
    reduced_over: tuple[str, ...]
    """Groups that its gradient is summed over."""


@dataclass(frozen=True, slots=True)
class OutputNote:
    """Two numbers a token of one part of one layer, of one micro-batch, as one rank computed them."""

    layer: int
    part: str
    micro_batch: int
    """Of the global batch, from 0."""
    positions: list[int]
    """Where in the sequence the rows stand."""
    values: np.ndarray
    """[positions, B, 2] fp32."""


@dataclass(frozen=True, slots=True)
class UnequalCopies:
    """Ranks that hold the same rectangle of a weight with other bits."""

    name: str
    offset: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    """Those of equal bits together."""
    at_start: bool
    """Before the first step already."""

    @property
    def text(self) -> str:
        sides = " and ".join(f"ranks {list(ranks)}" for ranks in self.ranks)
        when = "before the first step" if self.at_start else "after the last step"
        return f"copies of {self.name} at {list(self.offset)} are not equal {when}: {sides}"


@dataclass(kw_only=True, slots=True)
class RankAnswer:
    """What one rank reports of one phase."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    routing: list[np.ndarray] = field(default_factory=list)
    extras: tuple[str, ...] = ()
    """What the last columns of a routing table are."""
    margins: list[float] = field(default_factory=list)
    """Per step: how near the nearest choice of an expert was to another one, in units of its scores."""
    drop_margins: list[float] = field(default_factory=list)
    """Per step, of one process: how near the last assignment that found a slot was to the first that did not."""
    pieces: dict[str, list[TensorPiece]] = field(default_factory=dict)
    """By kind: gradient of the first step, reduced and not clipped; after the last step weight (fp32 masters),
    exp_avg, exp_avg_sq, and buffer: what no gradient moves (a router's bias). With Phase.every_gradient also start
    (masters before the first step) and the gradients of later steps (gradient_kind)."""
    stale: list[str] = field(default_factory=list)
    """Weights that this rank computes with after the last step and that are not its masters, rounded."""
    outputs: list[OutputNote] = field(default_factory=list)
    """Of the first step, with Phase.note_outputs."""
    loss_parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Of the first step of one process, with Phase.note_outputs: router's matrix -> LOSS_PARTS -> gradient of that loss
    of its own layer alone."""
    copies_at_start: list[WeightCopy] = field(default_factory=list)
    copies: list[WeightCopy] = field(default_factory=list)
    """After the last step."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """One phase, of all ranks together."""

    losses: list[float]
    """Per step: global token mean."""
    norms: list[float]
    """Per step: global gradient norm before clipping."""
    routing: list[np.ndarray]
    """Per step: [layers, E + extras], training.step.StepResult."""
    extras: tuple[str, ...]
    margins: list[float]
    """Per step: the nearest choice of all ranks; infinite without a router."""
    drop_margins: list[float]
    """Per step; infinite where nothing is dropped by probability, or on several ranks."""
    tensors: dict[str, dict[str, np.ndarray]]
    """Kind -> name -> logical tensor; NaN where no rank owns an element."""
    problems: list[str]
    """What does not fit together between ranks."""
    unequal: list[UnequalCopies]
    holders: dict[str, dict[int, WeightCopy]]
    """Name -> rank -> its copy (the last, where it holds several)."""
    outputs: dict[Place, np.ndarray] = field(default_factory=dict)
    """Place -> [micro-batches, S, B, 2]; NaN where no rank noted anything."""
    loss_parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """RankAnswer.loss_parts of one process."""

    def columns(self, extras: list[str] | None) -> list[np.ndarray]:
        """Per step, of every layer: the named extras; None: tokens of each expert."""
        if extras is None:
            return [table[:, : table.shape[1] - len(self.extras)] for table in self.routing]
        at = [self.extras.index(name) - len(self.extras) for name in extras]
        return [table[:, at] for table in self.routing]

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        return self.tensors[GRADIENT]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return self.tensors[WEIGHT]


def assemble(answers: list[RankAnswer]) -> Outcome:
    """The phase from the answers of rank 0, 1, ..."""
    problems = _disagreements(answers)
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for kind in answers[0].pieces:
        whole, times = _whole([piece for answer in answers for piece in answer.pieces[kind]])
        tensors[kind] = whole
        for name, count in times.items():
            missing, twice = int((count == 0).sum()), int((count > 1).sum())
            if missing or twice:
                problems.append(f"{kind} of {name}: of {count.size} elements {missing} have no owner, {twice} several")
    first = answers[0]
    at_start = _unequal([answer.copies_at_start for answer in answers], at_start=True)
    known = {unequal.name for unequal in at_start}
    unequal = at_start + [
        found for found in _unequal([answer.copies for answer in answers], at_start=False) if found.name not in known
    ]
    return Outcome(
        losses=first.losses, norms=first.norms, routing=first.routing, extras=first.extras,
        margins=list(np.min([answer.margins for answer in answers], axis=0)), drop_margins=first.drop_margins,
        tensors=tensors,
        problems=problems + [found.text for found in unequal], unequal=unequal, holders=_holders(answers),
        outputs=_whole_outputs([note for answer in answers for note in answer.outputs]), loss_parts=first.loss_parts,
    )  # fmt: skip


def _disagreements(answers: list[RankAnswer]) -> list[str]:
    """Every rank must report the same losses and norms."""
    found = []
    for what in ("losses", "norms"):
        values = [np.array(getattr(answer, what)) for answer in answers]
        others = [rank for rank, value in enumerate(values) if not np.array_equal(value, values[0], equal_nan=True)]
        if others:
            theirs, ours = values[others[0]].tolist(), values[0].tolist()
            found.append(f"{what} of rank {others[0]} are not those of rank 0: {theirs}, {ours}")
    for rank, answer in enumerate(answers):
        found += [f"rank {rank} computes with {name} that is not its fp32 master, rounded" for name in answer.stale]
    return found


def _whole(pieces: list[TensorPiece]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Logical tensors, and how many pieces cover each element."""
    whole: dict[str, np.ndarray] = {}
    times: dict[str, np.ndarray] = {}
    for piece in pieces:
        box = whole.setdefault(piece.name, np.full(piece.global_shape, np.nan, dtype=np.float32))
        where = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.values.shape, strict=True))
        box[where] = piece.values
        times.setdefault(piece.name, np.zeros(piece.global_shape, dtype=np.int32))[where] += 1
    return whole, times


def _whole_outputs(notes: list[OutputNote]) -> dict[Place, np.ndarray]:
    by_place: dict[Place, list[OutputNote]] = {}
    for note in notes:
        by_place.setdefault((note.layer, note.part), []).append(note)
    whole: dict[Place, np.ndarray] = {}
    for place, parts in by_place.items():
        count, size = 1 + max(note.micro_batch for note in parts), 1 + max(max(note.positions) for note in parts)
        box = whole.setdefault(place, np.full((count, size, *parts[0].values.shape[1:]), np.nan, dtype=np.float32))
        for note in parts:
            box[note.micro_batch, note.positions] = note.values
    return whole


def _unequal(copies: list[list[WeightCopy]], *, at_start: bool) -> list[UnequalCopies]:
    held: dict[tuple[str, tuple[int, ...]], dict[bytes, list[int]]] = {}
    for rank, own in enumerate(copies):
        for copy in own:
            held.setdefault((copy.name, copy.offset), {}).setdefault(copy.digest, []).append(rank)
    return [
        UnequalCopies(name, offset, tuple(map(tuple, digests.values())), at_start)
        for (name, offset), digests in held.items()
        if len(digests) > 1
    ]


def _holders(answers: list[RankAnswer]) -> dict[str, dict[int, WeightCopy]]:
    holders: dict[str, dict[int, WeightCopy]] = {}
    for rank, answer in enumerate(answers):
        for copy in answer.copies:
            holders.setdefault(copy.name, {})[rank] = copy
    return holders
