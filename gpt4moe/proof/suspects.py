"""suspects: from the pattern of what differs to what is likely wrong. Heuristics; each says what it saw.

A rule reads the evidence and says a line, or nothing. SUSPECT_RULES is in the order of certainty; a fault may answer to
several (a missing sum over tp also lets copies drift apart).
"""

from collections.abc import Callable, Iterator

import numpy as np

from gpt4moe.architecture.rows import Spread
from gpt4moe.architecture.tensors import has_spread
from gpt4moe.proof.evidence import DescentEvidence, is_near
from gpt4moe.proof.outcome import BUFFER, GRADIENT
from gpt4moe.proof.round_off import few


def suspects(seen: DescentEvidence) -> list[str]:
    """One line each, the most certain first; empty when nothing differs."""
    return [line for rule in SUSPECT_RULES for line in rule(seen)]


def _not_finite(seen: DescentEvidence) -> Iterator[str]:
    """Everything after the first such number is made of it."""
    for side, outcome in (("on this layout", seen.got), ("in one process", seen.want)):
        wrong = {name for name, value in outcome.gradients.items() if not np.isfinite(value).all()}
        at = next((at for at, pair in enumerate(zip(outcome.losses, outcome.norms, strict=True), 1)
                   if not np.isfinite(pair).all()), None)  # fmt: skip
        if wrong or at:
            what = f"the gradient of {_listed(wrong)}" if wrong else f"the loss or the norm of step {at}"
            yield f"not finite: {what} has NaN or infinity {side}."


def _copies_started_apart(seen: DescentEvidence) -> Iterator[str]:
    for unequal in (item for item in seen.got.unequal if item.at_start):
        yield (
            f"unsynchronised copies: {unequal.name} differs over {seen.axis_between(unequal.ranks)} before the first "
            "step; an initial value, a load or a broadcast left one out."
        )


def _owners(seen: DescentEvidence) -> Iterator[str]:
    lost = [problem for problem in seen.got.problems if problem.startswith(GRADIENT)]
    if lost:
        yield (
            f"wrong reduce group: {lost[0]}{f' (and {len(lost) - 1} tensors more)' if len(lost) > 1 else ''}; "
            "gradients are summed over other ranks than the table of parameters says, and the optimizer cuts them so."
        )


def _lost_micro_batches(seen: DescentEvidence) -> Iterator[str]:
    share, count = seen.routed_share, seen.micro_batches
    if share != 1.0 and np.isfinite(share):
        run = round(share * count)
        exact = f", {run} of {count} micro-batches a rank" if is_near(share * count, run, 1e-9) else ""
        yield f"lost micro-batch: the routers saw {share:.4g} of the tokens{exact}."


def _flipped_choices(seen: DescentEvidence) -> Iterator[str]:
    if seen.routed_share != 1.0:
        return
    got, want = (side.columns(None) for side in (seen.got, seen.want))
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return
    moved = float(np.max([np.abs(a - b).sum() / 2 for a, b in zip(got, want, strict=True)]))
    total = float(want[0].sum())
    if 0 < moved <= few(total):
        yield (
            f"a few choices: {moved:g} of {total:g} choices of experts differ, and not by a tie alone: the nearest "
            f"choice of the first step was {seen.want.margins[0]:.1e} from another. Something small is wrong before a "
            "router, or its bias; with another run.seed a fault stays."
        )


def _scaled(seen: DescentEvidence) -> Iterator[str]:
    """Families whose gradients are k times too large, each and all."""
    scales: dict[float, list[str]] = {}
    for label, names in seen.families.items():
        found = [seen.scale(name) for name in names if names <= seen.different]
        values = [k for k in found if k is not None]
        if values and len(values) == len(found) and max(values) - min(values) < 1e-3 * abs(max(values)):
            scales.setdefault(round(float(np.median(values)), 3), []).append(label)
    for k, labels in scales.items():
        yield (
            f"wrong scale: gradients of {' and '.join(labels)} are {k:g} times what they should be{_reason(seen, k)}. "
            "AdamW's losses hide this."
        )


def _reason(seen: DescentEvidence, k: float) -> str:
    """Which degree has the size of a wrong scale, if one has."""
    up = k >= 1
    size = round(k) if up else round(1 / k) if k > 0 else 0
    axes = [axis for axis, degree in seen.degrees.items() if degree == size]
    if not axes or not is_near(k if up else 1 / k, size, 0.01):
        return ""
    what = "a sum taken once too often" if up else "an average in place of a sum, or a sum left out"
    return f", and {size} is {' = '.join(axes)}: {what}"


def _missing_tp_sum(seen: DescentEvidence) -> Iterator[str]:
    partial = {name for name in seen.different if has_spread(name, Spread.whole)}
    if partial and seen.different == partial and seen.layout.tp * seen.layout.cp > 1:
        yield (
            f"missing sum over tp: of all gradients only {_listed(partial)} differ, which every tp rank holds whole "
            "and computes from its own tokens (the mark sequence_parallel of model/parameters.py)."
        )


def _expert_group(seen: DescentEvidence) -> Iterator[str]:
    if seen.different and seen.different <= seen.families["experts"] and not any(_scaled(seen)):
        yield (
            "wrong reduce group of experts: only their gradients differ, and not by a scale. They belong over "
            f"expert_dp, here {seen.layout.expert_dp} ranks (the mark allreduce=False of model/parameters.py)."
        )


def _norm(seen: DescentEvidence) -> Iterator[str]:
    got, want = seen.got.norms[0], seen.want.norms[0]
    if seen.different or is_near(got, want, 1e-6):
        return
    yield (
        f"wrong clip norm: every gradient is right, but the global norm is {got:.6g} instead of {want:.6g}"
        f"{_norm_reason(seen)}. Every clipped step is wrong by that."
    )


def _norm_reason(seen: DescentEvidence) -> str:
    """Which family, left out or counted several times, explains the norm."""
    excess = seen.got.norms[0] ** 2 - seen.want.norms[0] ** 2
    counts = {0: "without", **{degree: f"counted {axis}={degree} times:" for axis, degree in seen.degrees.items()}}
    for label, names in seen.families.items():
        part = seen.squared_norm(names)
        for times, words in counts.items():
            if part and is_near(excess, (times - 1) * part, 1e-4):
                return f", the norm {words} {label}"
    return ", some tensors are counted twice or not at all"


def _forward(seen: DescentEvidence) -> Iterator[str]:
    """The loss is wrong before any update, and neither copies nor micro-batches explain it."""
    if not seen.loss_differs or seen.routed_share != 1.0 or any(item.at_start for item in seen.got.unequal):
        return
    losses = f"the loss of the first step is {seen.got.losses[0]:.6g} instead of {seen.want.losses[0]:.6g}"
    if seen.layout.vpp > 1:
        yield f"crossed pipeline messages: {losses}, and stages are interleaved: a chunk gets another's activations."
    elif seen.layout.pp > 1:
        yield f"pipeline messages or a layer: {losses}; a stage gets the wrong activations, or computes something else."
    else:
        yield f"the forward pass: {losses}; a sum over tp, a router's pool, the dispatch, or initial weights."


def _backward(seen: DescentEvidence) -> Iterator[str]:
    others = seen.different & seen.families["all other weights"]
    if others and not seen.loss_differs and not any(_scaled(seen)) and not any(_owners(seen)):
        yield (
            f"the backward pass or the sum over dp_cp: the loss is right, gradients of {_listed(others)} are not; a "
            "collective with a wrong backward, a wrong group, or tied embeddings that are not summed over both stages."
        )


def _copies_drifted(seen: DescentEvidence) -> Iterator[str]:
    drifted = [item for item in seen.got.unequal if not item.at_start]
    if drifted:
        yield (
            f"copies that drift: {_listed({item.name for item in drifted})} start equal and end different over "
            f"{seen.axis_between(drifted[0].ranks)}; their gradient is not summed there, or not every copy is updated."
        )


def _buffers(seen: DescentEvidence) -> Iterator[str]:
    got, want = seen.got.tensors[BUFFER], seen.want.tensors[BUFFER]
    wrong = {name for name in want if not np.array_equal(got.get(name, np.empty(0)), want[name])}
    if wrong and not seen.different and not seen.loss_differs:
        yield (
            f"router state: {_listed(wrong)} moved otherwise although the first step's gradients and loss are right; "
            "the load it moves by must be the whole global batch's (StepRunner.finish_step)."
        )


def _padding(seen: DescentEvidence) -> Iterator[str]:
    """Batches of the first step have none, those of the others have (batches.ended_early)."""
    routed = [np.allclose(a, b, rtol=1e-5, atol=0) for a, b in zip(seen.got.routing, seen.want.routing, strict=True)]
    lost = [is_near(a, b, 1e-5) for a, b in zip(seen.got.losses, seen.want.losses, strict=True)]
    is_right = [loss and routing for loss, routing in zip(lost, routed, strict=True)]
    norm_is_right = is_near(seen.got.norms[0], seen.want.norms[0], 1e-6)
    if seen.different or seen.got.unequal or not (is_right[0] and norm_is_right) or all(is_right):
        return
    yield (
        f"padding: everything of step 1, whose batches have none, is right; losses or routing of step "
        f"{is_right.index(False) + 1}, whose batches have some, are not. Something counts tokens that are none "
        "(padding_mask of moe.layer), or a rank that has none takes another way."
    )


def _listed(names: set[str] | frozenset[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - 2} more" if len(ordered) > 2 else ""
    return ", ".join(ordered[:2]) + rest


SUSPECT_RULES: tuple[Callable[[DescentEvidence], Iterator[str]], ...] = (
    _not_finite, _copies_started_apart, _owners, _lost_micro_batches, _flipped_choices, _scaled, _missing_tp_sum,
    _expert_group, _norm, _forward, _buffers, _padding, _copies_drifted, _backward,
)  # fmt: skip
