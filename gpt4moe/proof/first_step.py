"""What is likely wrong in the first step, before any update: rules for the forward pass, the gradients and their norm.

A forward fault is looked for at the first output that differs, a backward fault at the last gradient that does
(proof.evidence). proof.suspects says when each rule is asked.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from gpt4moe.architecture.names import ROUTER, WORD_EMBEDDINGS, split_name
from gpt4moe.architecture.rows import Spread
from gpt4moe.architecture.tensors import has_spread
from gpt4moe.proof.compare import by_family, family_of
from gpt4moe.proof.evidence import LANGUAGE_MODEL, DescentEvidence, WrongOutput, is_near, listed

# Part -> what goes wrong where its output is the first that differs.
_OUTPUTS: dict[str, str] = {
    "embedding": "tokens: a rank gets other tokens than its place in the layout says (the batch's slices over cp or "
    "dp), or the embedding's sum over tp is wrong",
    "router": "router: its logits are wrong although its layer's input and attention are right",
    "choice": "router: its logits are right, the experts or weights that it chooses are not (its rule, or its bias)",
    "slots": "capacity: the router's choices are right, but other assignments are dropped. Slots must be counted over "
    "the whole micro-batch (tp x cp), in the order of the sequence",
    "shared experts": "shared experts: their output is wrong, the routed experts' is right; a sum over tp or their cut",
    "mlp": "MLP: a sum over tp, or its cut",
    "output": "residual: attention and MLP of the layer are right, their sum is not",
    "token loss": "output layer: every layer's output is right, the tokens' losses are not; labels (the batch's "
    "slices), final norm, output layer, or the loss's sum over tp",
}  # fmt: skip


def forward(seen: DescentEvidence) -> Iterator[str]:
    """The first output that differs; or, where every output is right, how losses are summed."""
    wrong = seen.first_output()
    if wrong is not None:
        yield f"{_what(seen, wrong)}. In the forward pass of step 1 the first output that differs is {wrong.where}."
    elif seen.loss_differs:
        yield from _loss(seen)


def _what(seen: DescentEvidence, wrong: WrongOutput) -> str:
    layout = seen.layout
    if wrong.part == "input":
        crossed = layout.vpp > 1 or wrong.is_exchanged
        gets = "crossed pipeline messages: a chunk gets another's activations" if crossed else (
            "pipeline messages: a stage gets wrong activations"
        )  # fmt: skip
        return f"{gets}; the layer before it put out the right ones"
    if wrong.part == "attention":
        causes = ["the order of keys and positions over cp (RoPE, causal mask)"] if layout.cp > 1 else []
        causes += ["the sum over tp of its output"] if layout.tp > 1 else []
        return f"attention: {', or '.join(causes or ['its kernel, or its recomputation'])}"
    if wrong.part == "experts":
        etp = "the sum over etp of experts that are cut, or " if layout.etp > 1 else ""
        return (
            f"dispatch: router and slots are right, what comes back from the experts is not; {etp}a row that goes to "
            "another expert, or replies that come back in another order"
        )
    assert seen.run.model.moe is not None or wrong.part not in ("router", "choice", "slots", "shared experts")
    noise = wrong.part == "router" and seen.run.model.moe is not None and seen.run.model.moe.router.input_jitter > 0
    by_token = "; router noise must be drawn by the number of the token in the run, not by its place on a rank"
    return _OUTPUTS[wrong.part] + (by_token if noise else "")


def _loss(seen: DescentEvidence) -> Iterator[str]:
    got, want = seen.got.losses[0], seen.want.losses[0]
    losses = f"the loss of the first step is {got:.6g} instead of {want:.6g} ({got / want:.4g} times)"
    if seen.want.outputs:
        yield (
            f"loss scaling or loss mask: the loss of every token is right, but {losses}{_reason(seen, got / want)}. "
            "The mask, or the number of unmasked tokens of the global batch that the sum is divided by."
        )
    else:
        yield f"the forward pass: {losses}."


def scaled(seen: DescentEvidence) -> Iterator[str]:
    """Families whose gradients are k times too large, each and all; by how they are summed, else by their part."""
    lines = list(_scales_of(seen, seen.families)) or list(_scales_of(seen, by_family(sorted(seen.want.gradients))))
    if seen.different == {WORD_EMBEDDINGS}:
        return  # _tied says more
    yield from lines


def _scales_of(seen: DescentEvidence, families: Mapping[str, Iterable[str]]) -> Iterator[str]:
    scales: dict[float, list[str]] = {}
    for label, names in families.items():
        found = [seen.scale(name) for name in names if seen.different.issuperset(names)]
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


def missing_tp_sum(seen: DescentEvidence) -> Iterator[str]:
    partial = {name for name in seen.different if has_spread(name, Spread.whole)}
    if partial and seen.different == partial and seen.layout.tp * seen.layout.cp > 1:
        yield (
            f"missing sum over tp: of all gradients only {listed(partial)} differ, which every tp rank holds whole "
            "and computes from its own tokens (the mark sequence_parallel of model/parameters.py)."
        )


def expert_group(seen: DescentEvidence) -> Iterator[str]:
    if seen.different and seen.different <= seen.families["experts"] and not any(scaled(seen)):
        yield (
            "wrong reduce group of experts: only their gradients differ, and not by a scale. They belong over "
            f"expert_dp, here {seen.layout.expert_dp} ranks (the mark allreduce=False of model/parameters.py)."
        )


def tied(seen: DescentEvidence) -> Iterator[str]:
    if seen.different == {WORD_EMBEDDINGS} and seen.run.model.tied_embeddings and seen.layout.pp > 1:
        k = seen.scale(WORD_EMBEDDINGS)
        times = f", it is {k:g} times what it should be" if k is not None else ""
        yield (
            f"tied embeddings: of all gradients only that of the embedding differs{times}; the first and the last "
            "stage hold a copy each, and their gradients must be summed once."
        )


def auxiliary_losses(seen: DescentEvidence) -> Iterator[str]:
    """The last gradient that differs is a router's: everything behind it is right, so which part of it is wrong can be
    told."""
    name = seen.last_gradient
    if name is None or split_name(name)[1] != ROUTER or seen.loss_differs:
        return
    parts = seen.router_parts(name)
    wrong = {part: times for part, times in (parts or {}).items() if not is_near(times, 1.0, 1e-2)}
    if not wrong:
        return
    recompute = seen.run.parallel.recompute.value
    again = "" if recompute == "none" else f" (recompute={recompute} runs a part of the forward pass a second time)"
    lines = []
    for part, times in wrong.items():
        size = "is missing" if abs(times) < 1e-2 else f"is {times:.4g} times what it should be{_reason(seen, times)}"
        lines.append(f"the part of the {part} {size}")
    what = (
        "router"
        if LANGUAGE_MODEL in wrong
        else "auxiliary losses"
        if len(wrong) > 1
        else f"scale of the {next(iter(wrong))}"
    )
    yield (
        f"{what}: in the gradient of {name}, the last that differs, {'; '.join(lines)}{again}. "
        + ("The router's weights must stay in the graph of the experts' outputs." if LANGUAGE_MODEL in wrong else
           "The scale of auxiliary losses is 1 / micro-batches of the global batch, on every rank and in every layer.")
    )  # fmt: skip


def backward(seen: DescentEvidence) -> Iterator[str]:
    """Where nothing more exact is known."""
    name = seen.last_gradient
    if name is None or seen.loss_differs:
        return
    behind = {family_of(other) for other in seen.want.gradients.keys() - seen.different}
    yield (
        f"the backward pass: the forward pass of step 1 is right, and {name} ({family_of(name)}) is the last gradient "
        f"that differs, in the order of the forward pass; all behind it are right ({len(seen.different)} of "
        f"{len(seen.want.gradients)} differ). A collective with a wrong backward pass there, or a sum over a wrong "
        "group" + ("" if behind else "; every gradient differs, so the loss's own scale or output layer") + "."
    )


def norm_suspects(seen: DescentEvidence) -> Iterator[str]:
    """A wrong norm of right gradients."""
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
