"""replay: computes clipping, AdamW and routers' buffers once more in fp64, from a run's own numbers. numpy, no torch.

    masters at the start, gradients of every step --norm, clip, AdamW--> masters and moments at the end
    loads of every step --a router's rule--> its bias and load share at the end

A bf16 run has an fp32 optimizer too, so rounding hides no wrong norm, no skipped update, no moments of other gradients.
update_suspects names what differs: a skipped step, a learning rate, a decay. Loshchilov and Hutter, arXiv:1711.05101,
algorithm 2, with the decay that torch.optim.AdamW multiplies by the learning rate.
"""

from collections.abc import Collection, Iterator, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from itertools import combinations

import numpy as np

from gpt4moe.architecture.names import split_name
from gpt4moe.config.optimizer import OptimizerKind, TensorSettings
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.config.run import RunConfig
from gpt4moe.proof.compare import by_family, distance, model_order, total_norm
from gpt4moe.proof.outcome import START, WEIGHT, Outcome, gradient_kind
from gpt4moe.training.learning_rate import learning_rate

MEAN, MEAN_OF_SQUARES = OPTIMIZERS[OptimizerKind.adamw].states
Tensors = dict[str, np.ndarray]
_NEAR = 0.02
"""Of a rate or a decay: how near to 1 it must come to be right."""
# Kind -> what passes between fp32 and fp64; masters relative to how far they moved, a hundredth of what they are.
REPLAYED = {WEIGHT: 1e-4, MEAN: 1e-5, MEAN_OF_SQUARES: 1e-5}


def norms(got: Outcome) -> list[float]:
    """Of each step's gradients before clipping."""
    return [total_norm(got.tensors[gradient_kind(step)]) for step in range(1, len(got.losses) + 1)]


def moved(got: Outcome) -> Tensors:
    """Masters after the last step less those before the first."""
    start, end = got.tensors[START], got.tensors[WEIGHT]
    return {name: end[name].astype(np.float64) - start[name] for name in start.keys() & end.keys()}


class Decay(Enum):
    """Which tensors a replay decays."""

    matrices = "matrices"
    """As training does: norms don't decay."""
    nothing = "nothing"
    everything = "everything"


def decays(tensor: np.ndarray) -> bool:
    return tensor.ndim > 1


def replay(
    got: Outcome, run: RunConfig, skipped: Collection[int] = (), *, decay: Decay = Decay.matrices
) -> dict[str, Tensors]:
    """Kind -> name -> tensor in fp64: moments, and how far masters moved.

    Args:
        got: of a phase with every_gradient.
        skipped: steps (from 1) to leave out.
    """
    settings = run.optimizer
    start = {name: value.astype(np.float64) for name, value in got.tensors[START].items()}
    made: dict[str, Tensors] = {
        WEIGHT: {name: value.copy() for name, value in start.items()},
        MEAN: {name: np.zeros_like(value) for name, value in start.items()},
        MEAN_OF_SQUARES: {name: np.zeros_like(value) for name, value in start.items()},
    }
    taken = 0
    for step, norm in enumerate(norms(got), 1):
        if step in skipped:
            continue
        taken += 1
        # The rule of training.engine.clip_gradients.
        factor = settings.clip_norm / (norm + 1e-6) if 0 < settings.clip_norm < norm + 1e-6 else 1.0
        rate = learning_rate(step, settings.lr, run.schedule)
        for name, gradient in got.tensors[gradient_kind(step)].items():
            if name in start:
                _adamw(made, name, gradient.astype(np.float64) * factor, rate, taken, run, decay)
    made[WEIGHT] = {name: value - start[name] for name, value in made[WEIGHT].items()}
    return made


def buffers(got: Outcome, names: Collection[str], run: RunConfig) -> Tensors:
    """What the steps' loads make of routers' buffers: the bias (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) and the
    loads' shares of the step before.

    Args:
        names: of routers' buffers. Those without a rule here are left out; the report lists them as not proved.
    """
    made = {}
    for name in names:
        layer, part = split_name(name)
        rule = BUFFER_RULES.get(part.rpartition(".")[2])
        if rule is not None and layer is not None:
            made[name] = rule([table[layer] for table in got.columns(None)], run)
    return made


def _bias(loads: Sequence[np.ndarray], run: RunConfig) -> np.ndarray:
    assert run.model.moe is not None
    directions = [np.sign(load.sum() - load * load.size) for load in loads]
    return run.model.moe.router.bias_update_rate * np.sum(directions, axis=0)


def _load_share(loads: Sequence[np.ndarray], run: RunConfig) -> np.ndarray:
    even = np.full(loads[0].size, 1 / loads[0].size)
    return next((load / load.sum() for load in reversed(loads) if load.sum() > 0), even)


BUFFER_RULES = {"bias": _bias, "load_share": _load_share}
"""Buffer -> what the loads of all steps make of it."""


def _adamw(
    made: dict[str, Tensors], name: str, gradient: np.ndarray, rate: float, taken: int, run: RunConfig, decay: Decay
) -> None:
    settings = run.optimizer
    weight, mean, squares = made[WEIGHT][name], made[MEAN][name], made[MEAN_OF_SQUARES][name]
    mean += (1 - settings.beta1) * (gradient - mean)
    squares += (1 - settings.beta2) * (gradient**2 - squares)
    own = next(
        (entry for entry in settings.by_pattern if fnmatchcase(name, entry.tensors)), TensorSettings(tensors=name)
    )
    rate *= own.lr_factor
    if own.weight_decay is not None:
        weight *= 1 - rate * own.weight_decay * (decay is not Decay.nothing)
    elif decay is Decay.everything or (decay is Decay.matrices and decays(weight)):
        weight *= 1 - rate * settings.weight_decay
    size = np.sqrt(squares / (1 - settings.beta2**taken)) + settings.epsilon
    weight -= rate * mean / (1 - settings.beta1**taken) / size


def update_suspects(got: Outcome, run: RunConfig) -> list[str]:
    """One line each, of the AdamW phase of a layout; empty when its update is right and all
    copies are equal."""
    made = [own / right for own, right in zip(got.norms, norms(got), strict=True) if right]
    if any(abs(share - 1) > 1e-5 for share in made):
        step = next(at for at, share in enumerate(made, 1) if abs(share - 1) > 1e-5)
        return [f"wrong clip norm: step {step} has a norm {made[step - 1]:.4g} times that of its own gradients."]
    wrong = wrong_updates(got, run)
    if wrong:
        return [update_line(got, run, wrong)]
    drifted = [item for item in got.unequal if not item.at_start]
    if drifted:
        return [
            f"weights not gathered after the update: the masters of {drifted[0].name} are right on the ranks that own "
            f"them, but ranks compute with different copies ({len(drifted)} parts of tensors)."
        ]
    return []


def wrong_updates(got: Outcome, run: RunConfig, skipped: Sequence[int] = ()) -> list[str]:
    """Tensors whose masters or moments are not what clipping and AdamW make of the run's own gradients."""
    made, ours = replay(got, run, skipped), got.tensors | {WEIGHT: moved(got)}
    names = {
        name
        for kind, tolerance in REPLAYED.items()
        for name in made[kind]
        if name in ours[kind] and not distance(ours[kind][name], made[kind][name]) <= tolerance
    }
    return sorted(names, key=model_order)


def update_line(got: Outcome, run: RunConfig, names: Sequence[str]) -> str:
    """What explains that `names` are not updated as they should be: a skipped step, a rate, a decay; or nothing."""
    steps = range(1, len(got.losses) + 1)
    listed = f"masters and moments of {len(names)} tensors, {names[0]} first,"
    for count in steps:
        for skipped in combinations(steps, count):
            if not set(names) & set(wrong_updates(got, run, skipped)):
                taken = " and ".join(map(str, skipped))
                return f"skipped update: {listed} are as if step {taken} had not been taken."
    explained = list(_rates(got, run, names))
    if explained:
        return "; ".join(explained) + "."
    return f"wrong update: {listed} are not what clipping and AdamW make of the run's own gradients."


def _rates(got: Outcome, run: RunConfig, names: Sequence[str]) -> Iterator[str]:
    """Families that move k times as far as AdamW says, or whose decay is another one."""
    adam = replay(got, run, decay=Decay.nothing)[WEIGHT]
    decayed = replay(got, run, decay=Decay.everything)[WEIGHT]
    ours = moved(got)
    for family, members in by_family(names).items():
        rates, shares = [], []
        for name in members:
            columns = np.stack([adam[name].ravel(), (decayed[name] - adam[name]).ravel()], axis=1)
            fit, *_ = np.linalg.lstsq(columns, ours[name].astype(np.float64).ravel(), rcond=None)
            if distance(columns @ fit, ours[name].ravel(), floor=float(np.linalg.norm(adam[name]))) > 1e-3:
                return
            rates.append(float(fit[0]))
            shares.append(float(fit[1]))
        rate, share = float(np.median(rates)), float(np.median(shares))
        should = 1.0 if decays(adam[members[0]]) else 0.0
        if abs(rate - 1) > _NEAR:
            yield f"learning rate: {family} moves {rate:.3g} times as far as its gradients and learning rate say"
        elif abs(share - should) > 10 * _NEAR:
            yield f"weight decay: {family} decays {share:.2f} times optimizer.weight_decay, it should {should:g} times"
