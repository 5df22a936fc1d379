"""Rules that go from what differs to what is likely wrong. Heuristics; each says what it saw.

A rule reads the evidence and yields a line, or nothing. Rules stand in groups. The first group that says anything is
the answer, for what comes later is its consequence: a wrong forward pass makes every gradient wrong, a wrong gradient
makes later losses wrong.

    no forward pass can be right  not finite, copies or weights that start apart, tensors without an owner, lost batches
    forward                       the first output that differs (evidence.first_output)
    backward                      the last gradient that differs: scales, sums, auxiliary losses, tied embeddings
    after the backward pass       norm, buffers of routers, gradients that are not zeroed, padding, few choices, update
"""

from collections.abc import Callable, Iterator

import numpy as np

from gpt4moe.proof import first_step
from gpt4moe.proof.evidence import DescentEvidence, is_near, listed
from gpt4moe.proof.outcome import BUFFER, GRADIENT, START
from gpt4moe.proof.replay import update_suspects
from gpt4moe.proof.round_off import few

Rule = Callable[[DescentEvidence], Iterator[str]]


def suspects(seen: DescentEvidence) -> list[str]:
    """One line each, the most certain first; empty when nothing differs."""
    for rules in SUSPECT_RULES:
        lines = [line for rule in rules for line in rule(seen)]
        if lines:
            return lines
    return []


def _not_finite(seen: DescentEvidence) -> Iterator[str]:
    """Everything after the first such number is made of it."""
    for side, outcome in (("on this layout", seen.got), ("in one process", seen.want)):
        wrong = {name for name, value in outcome.gradients.items() if not np.isfinite(value).all()}
        at = next((at for at, pair in enumerate(zip(outcome.losses, outcome.norms, strict=True), 1)
                   if not np.isfinite(pair).all()), None)  # fmt: skip
        if wrong or at:
            what = f"the gradient of {listed(wrong)}" if wrong else f"the loss or the norm of step {at}"
            yield f"not finite: {what} has NaN or infinity {side}."


def _copies_started_apart(seen: DescentEvidence) -> Iterator[str]:
    for unequal in (item for item in seen.got.unequal if item.at_start):
        yield (
            f"unsynchronised copies: {unequal.name} differs over {seen.axis_between(unequal.ranks)} before the first "
            "step; an initial value, a load or a broadcast left one out."
        )


def _weights_started_wrong(seen: DescentEvidence) -> Iterator[str]:
    """Every copy is equal, and still not the weight of one process."""
    wrong = seen.wrong_weights
    if not wrong or any(item.at_start for item in seen.got.unequal):
        return
    got, want = seen.got.tensors[START], seen.want.tensors[START]
    alike = [name for name, value in want.items() if wrong[0] in got and np.array_equal(value, got[wrong[0]])]
    whose = f", it is {alike[0]} of one process" if alike else ""
    yield (
        f"initial weights: {listed(set(wrong))} is not what one process begins with{whose}; "
        + ("chunks or layers get each other's weights." if alike else "their initial values, or how they are cut.")
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


def _buffers(seen: DescentEvidence) -> Iterator[str]:
    got, want = seen.got.tensors[BUFFER], seen.want.tensors[BUFFER]
    wrong = {name for name in want if not np.array_equal(got.get(name, np.empty(0)), want[name])}
    if wrong and not seen.different and not seen.loss_differs:
        yield (
            f"router state: {listed(wrong)} moved otherwise although the first step's gradients and loss are right; "
            "the load it moves by must be the whole global batch's (StepRunner.finish_step)."
        )


def _steps_right(seen: DescentEvidence, *, loss: float) -> tuple[list[bool], list[bool]]:
    """Of each step of the AdamW phase, whose batches have no padding: are loss and choices right, is the norm."""
    assert seen.adamw is not None
    got, want = seen.adamw
    loads = [np.array_equal(a, b) for a, b in zip(got.columns(None), want.columns(None), strict=True)]
    losses = [is_near(a, b, loss) for a, b in zip(got.losses, want.losses, strict=True)]
    norms = [is_near(a, b, 100 * loss) for a, b in zip(got.norms, want.norms, strict=True)]
    return [a and b for a, b in zip(loads, losses, strict=True)], norms


def _not_zeroed(seen: DescentEvidence) -> Iterator[str]:
    """Gradients are wrong from the second step on, in a step whose forward pass is right."""
    if seen.adamw is None or seen.different:
        return
    forward, norms = _steps_right(seen, loss=1e-5)
    if len(norms) > 1 and norms[0] and not norms[1] and forward[0] and forward[1]:
        got, want = (side.norms[1] for side in seen.adamw)
        yield (
            f"gradients that are not zeroed: step 1 is right, and so are loss and choices of step 2, but its gradient "
            f"norm is {got:.6g} instead of {want:.6g}, also without any padding. Something of step 1 is left in the "
            "gradient buffers."
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
        f"{is_right.index(False) + 1}, whose batches have some, are not. Something counts padding as tokens "
        "(padding_mask of moe.layer), or a rank that has none takes another way."
    )


def _copies_drifted(seen: DescentEvidence) -> Iterator[str]:
    drifted = [item for item in seen.got.unequal if not item.at_start]
    if drifted:
        yield (
            f"copies that drift: {listed({item.name for item in drifted})} start equal and end different over "
            f"{seen.axis_between(drifted[0].ranks)}; their gradient is not summed there, or not every copy is updated."
        )


def _flipped_choices(seen: DescentEvidence) -> Iterator[str]:
    """Only where the first step says nothing: a wrong gradient turns choices of later steps too."""
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


def _update(seen: DescentEvidence) -> Iterator[str]:
    if seen.adamw is not None:
        yield from update_suspects(seen.adamw[0], seen.run)


SUSPECT_RULES: tuple[tuple[Rule, ...], ...] = (
    (_owners, _not_finite, _copies_started_apart, _weights_started_wrong, _lost_micro_batches),
    (first_step.forward,),
    (
        first_step.scaled,
        first_step.tied,
        first_step.missing_tp_sum,
        first_step.expert_group,
        first_step.auxiliary_losses,
    ),
    (first_step.backward,),
    (first_step.norm_suspects,),
    (_buffers,),
    (_not_zeroed,),
    (_padding,),
    (_copies_drifted, _flipped_choices),
    (_update,),
)
"""Groups of rules. The first group that says anything is the answer."""
