"""What a run reads of each source: shares from data.sources and data.phases, then samples, epochs and their limits.

data.sources, tokens of each source --phases_of--> shares --uses, over the whole run--> samples, epochs
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gpt4moe.config.data import SourceConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.step_sizes import StepSizes
from gpt4moe.data.mixture import Part, Phase, PhasedMixture, names_of
from gpt4moe.data.samples import num_samples
from gpt4moe.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceUse:
    """One source over a whole run."""

    source: str
    tokens: float
    """That it has."""
    share: float
    """Of the run's tokens, all phases together."""
    samples: int
    """That the run reads."""
    tokens_read: int
    epochs: float
    """How often the run reads the source."""
    max_epochs: float | None
    origin: str


def phases_of(run: RunConfig, tokens: dict[str, float]) -> list[Phase]:
    """The run's phases, the first from sample 0 on.

    Args:
        tokens: training tokens of each source that there is.
    Raises: DataError for an unknown source.
    """
    chosen = run.data.chosen or dict.fromkeys(tokens, SourceConfig())
    _require_known("data.sources", chosen, tokens)
    weights = {
        name: tokens[name] * source.epochs if source.share is None else source.share for name, source in chosen.items()
    }
    phases, sizes = [Phase(0, _normalised(weights))], run.step_sizes
    for number, phase in enumerate(run.data.phases):
        _require_known(f"data.phases[{number}].shares", phase.shares, tokens)
        phases.append(Phase(sizes.samples_until(phase.from_tokens), _normalised(phase.shares)))
    return phases


def validation_of(run: RunConfig, tokens: dict[str, float], phases: Sequence[Phase]) -> Phase:
    """The shares of held-out samples. Raises: DataError for an unknown source."""
    _require_known("data.validation", run.data.validation, tokens)
    return Phase(0, _normalised(run.data.validation)) if run.data.validation else phases[0]


def uses(
    run: RunConfig, tokens: dict[str, float], phases: Sequence[Phase], rows: dict[str, int] | None = None
) -> list[SourceUse]:
    """Every source that is read, over training.steps.

    Args:
        rows: samples of an epoch where they are not stretches of S tokens, as rows of conversations.
    """
    length, sizes, chosen = run.model.seq_length, run.step_sizes, run.data.chosen
    windows = {name: max(1, num_samples(int(tokens[name]), length)) for name in names_of(phases)} | (rows or {})
    mixture = PhasedMixture(windows, phases, run.run.seed, parts_of(run))
    total = sizes.samples(run.training.steps)
    counts, epochs, read = mixture.consumed(total), mixture.epochs(total), _tokens_read(mixture, sizes, total)
    return [
        SourceUse(
            source=name, tokens=tokens[name], share=read[name] / sizes.tokens(run.training.steps), samples=count,
            tokens_read=read[name], epochs=epochs[name],
            max_epochs=chosen[name].max_epochs if name in chosen else None,
            origin=chosen[name].origin if name in chosen else "",
        )
        for name, count in counts.items()
    ]  # fmt: skip


def parts_of(run: RunConfig) -> list[Part]:
    """Where the length of samples changes (training.length_ramp)."""
    return [Part(first, run.model.seq_length // length) for first, length in run.step_sizes.lengths()]


def settled_samples(run: RunConfig, drawn: int) -> int:
    """How many samples of the order no change may touch once `drawn` of them were read: a part of shorter samples that
    has begun is settled up to its end, because its pieces are permuted over all windows that it takes."""
    starts = [first for first, _ in run.step_sizes.lengths()]
    return next((end for first, end in pairwise(starts) if first < drawn < end), drawn)


def _tokens_read(mixture: PhasedMixture, sizes: StepSizes, total: int) -> dict[str, int]:
    """Of each source, in the first `total` samples."""
    lengths, read = sizes.lengths(), dict.fromkeys(mixture.names, 0)
    ends = [first for first, _ in lengths[1:]] + [total]
    for (first, length), end in zip(lengths, ends, strict=True):
        before, after = (mixture.consumed(min(at, total)) for at in (first, end))
        read = {name: tokens + (after[name] - before[name]) * length for name, tokens in read.items()}
    return read


def require_epochs(run: RunConfig, found: Sequence[SourceUse]) -> None:
    """Raises: DataError for a source that would be read more often than its max_epochs."""
    for use in found:
        if use.max_epochs is not None and use.epochs > use.max_epochs:
            fits = use.max_epochs / use.epochs
            sizes = run.step_sizes
            steps = sizes.steps(sizes.tokens(run.training.steps) * fits)
            raise DataError(
                f"Source {use.source} has {use.tokens:,.0f} tokens, and training.steps={run.training.steps} reads it "
                f"{use.epochs:.2f} times; data.sources.{use.source}.max_epochs is {use.max_epochs:g}.",
                f"Give more text, other shares by which {use.source} is at most "
                f"{math.floor(use.share * fits * 1000) / 10:g}% of the run (it is {use.share:.1%}), "
                f"training.steps={steps} or fewer, or a larger max_epochs.",
            )


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    """Of the sources above 0, in the order of their names."""
    positive = {name: weight for name, weight in sorted(weights.items()) if weight > 0}
    total = math.fsum(positive.values())
    return {name: weight / total for name, weight in positive.items()}


def _require_known(where: str, names: Iterable[str], tokens: dict[str, float]) -> None:
    for name in names:
        if name not in tokens:
            raise DataError(
                f"{where}.{name} is not in the data folder.",
                f"Its sources are {', '.join(tokens)}; leave data.sources empty to take all by their tokens.",
            )
