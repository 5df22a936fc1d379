"""replay: what clipping and AdamW make of a run's own gradients, once more, in fp64. numpy, no torch.

    masters at the start, gradients of every step --norm, clip, AdamW--> masters and moments at the end
    loads of every step --a router's rule--> its bias and load share at the end

The optimizer is fp32 in a bf16 run as well, so no rounding of the forward pass hides a wrong norm, a step that was not
taken, or moments of other gradients. Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, with the decay that
torch.optim.AdamW multiplies by the learning rate.
"""

from collections.abc import Collection, Sequence

import numpy as np

from gpt4moe.config.optimizer import OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.config.run import RunConfig
from gpt4moe.proof.compare import total_norm
from gpt4moe.proof.outcome import START, WEIGHT, Outcome, gradient_kind
from gpt4moe.training.learning_rate import learning_rate

MEAN, MEAN_OF_SQUARES = OPTIMIZERS[OptimizerKind.adamw].states
Tensors = dict[str, np.ndarray]


def norms(got: Outcome) -> list[float]:
    """Of each step's gradients before clipping."""
    return [total_norm(got.tensors[gradient_kind(step)]) for step in range(1, len(got.losses) + 1)]


def moved(got: Outcome) -> Tensors:
    """Masters after the last step less those before the first."""
    start, end = got.tensors[START], got.tensors[WEIGHT]
    return {name: end[name].astype(np.float64) - start[name] for name in start.keys() & end.keys()}


def replay(got: Outcome, run: RunConfig, skipped: Collection[int] = ()) -> dict[str, Tensors]:
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
                _adamw(made, name, gradient.astype(np.float64) * factor, rate, taken, run)
    made[WEIGHT] = {name: value - start[name] for name, value in made[WEIGHT].items()}
    return made


def buffers(got: Outcome, names: Collection[str], run: RunConfig) -> Tensors:
    """What the steps' loads make of routers' buffers: the bias (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) and the
    loads' shares of the step before.

    Args:
        names: of buffers, decoder.layers.<layer>.mlp.router.<bias or load_share>.
    """
    made = {}
    for name in names:
        _, _, layer, *_, kind = name.split(".")
        made[name] = _RULES[kind]([table[int(layer)] for table in got.columns(None)], run)
    return made


def _bias(loads: Sequence[np.ndarray], run: RunConfig) -> np.ndarray:
    assert run.model.moe is not None
    directions = [np.sign(load.sum() - load * load.size) for load in loads]
    return run.model.moe.router.bias_update_rate * np.sum(directions, axis=0)


def _load_share(loads: Sequence[np.ndarray], run: RunConfig) -> np.ndarray:
    even = np.full(loads[0].size, 1 / loads[0].size)
    return next((load / load.sum() for load in reversed(loads) if load.sum() > 0), even)


_RULES = {"bias": _bias, "load_share": _load_share}


def _adamw(made: dict[str, Tensors], name: str, gradient: np.ndarray, rate: float, taken: int, run: RunConfig) -> None:
    settings = run.optimizer
    weight, mean, squares = made[WEIGHT][name], made[MEAN][name], made[MEAN_OF_SQUARES][name]
    mean += (1 - settings.beta1) * (gradient - mean)
    squares += (1 - settings.beta2) * (gradient**2 - squares)
    if weight.ndim > 1:  # norms don't decay
        weight *= 1 - rate * settings.weight_decay
    size = np.sqrt(squares / (1 - settings.beta2**taken)) + settings.epsilon
    weight -= rate * mean / (1 - settings.beta1**taken) / size
