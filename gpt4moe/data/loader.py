"""build_data: the train and validation streams of a run, the same on every rank.

    n --mixture--> (source, epoch, position) --permutation--> index --packed_sample--> TokenSample --stack--> Batch
    the n of a step, at once, where all is plain text --MixedSamples.step_text--> StepText --cut--> Batch, Batch, ...

Nothing here has state. `consumed_samples` alone determines the next samples; it is the whole data state of a run, but
for one that went back and passes over samples (passed_over.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.run import RunConfig
from gpt4moe.config.stage import StageKind
from gpt4moe.data.batch import Batch, cut, stack
from gpt4moe.data.blend import parts_of
from gpt4moe.data.check import CheckedData, check_data
from gpt4moe.data.mixed import MixedSamples
from gpt4moe.data.mixture import WHOLE, Phase, PhasedMixture, names_of
from gpt4moe.data.mock_images import MockImages
from gpt4moe.data.passed_over import NOTHING, PassedOver
from gpt4moe.data.rows import RowSamples
from gpt4moe.data.samples import MockSamples, TokenSample, num_samples
from gpt4moe.errors import DataError

EVERY = slice(None)


class Samples(Protocol):
    """Anything that can return its n-th sample."""

    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        """Args: pixels: False: images are not decoded, only counted."""

    def origin(self, n: int, at: int) -> str:
        """Where token `at` of sample n comes from, for a person. Raises: DataError for a damaged index."""

    def consumed(self, n: int) -> dict[str, int]:
        """Samples of each source among the first n."""


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The samples of one split, and the micro-batches that a rank gets of them."""

    samples: Samples
    vocab_size: int
    """Of the model. No batch has another token."""

    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        return self.samples.sample(n, pixels=pixels)

    def micro_batches(
        self, consumed_samples: int, *, global_batch_size: int, micro_batch_size: int, dp: int, dp_index: int,
        with_pixels: slice = EVERY,
    ) -> list[Batch]:  # fmt: skip
        """This rank's micro-batches of the step that follows `consumed_samples`, each [micro_batch_size, S].

        Args:
            with_pixels: those whose images are decoded; of the others they are only counted.
        Raises: ValueError when global_batch_size is no multiple of micro_batch_size * dp; DataError for damaged files,
            and for a token that is not in the vocabulary.
        """
        numbers = micro_batch_samples(
            consumed_samples,
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, dp=dp, dp_index=dp_index,
        )  # fmt: skip
        reader = f"data-parallel rank {dp_index} of {dp}"
        if isinstance(self.samples, MixedSamples):
            of_rank = np.fromiter(chain.from_iterable(numbers), dtype=np.int64)
            text = self.samples.step_text(of_rank, global_batch_size)
            # The largest of whole blocks is perhaps in a stretch that none of these samples has.
            if text.largest >= self.vocab_size and not (self._knows(text.tokens) and self._knows(text.labels)):
                for n in of_rank.tolist():
                    self._require_known(n, self.sample(n), reader)
            return cut(text, of_rank, micro_batch_size)
        decoded = set(range(len(numbers))[with_pixels])
        made = []
        for index, micro_batch in enumerate(numbers):
            samples = [self.sample(n, pixels=index in decoded) for n in micro_batch]
            for n, sample in zip(micro_batch, samples, strict=True):
                self._require_known(n, sample, reader)
            made.append(stack(samples, micro_batch))
        return made

    def _knows(self, tokens: NDArray[np.integer]) -> bool:
        return bool(tokens.min() >= 0 and tokens.max() < self.vocab_size)

    def _require_known(self, n: int, sample: TokenSample, reader: str) -> None:
        """Raises: DataError for a token that is not in the vocabulary. An embedding that is cut over tp takes it for
        another rank's and trains on zeros, without a word; on a GPU it is an assertion of a kernel."""
        tokens = sample.tokens
        if self._knows(tokens):
            return
        at = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        raise DataError(
            f"Sample {n}, read by {reader}, has the token {tokens[at]}, but model.vocab_size={self.vocab_size}: "
            f"{self.samples.origin(n, at)}.",
            "Verify the data folder (tools/mixture.py verify FOLDER), and make the source again.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads."""

    train: SampleStream
    validation: SampleStream
    """Held-out text, mixed as the training text, in samples of model.seq_length at every step. Its order is the same
    for every seed; it repeats at its end."""
    identity: dict[str, str]
    """CheckedData.identity: must be the same on a restart."""
    tokenizer: Path | None
    source_names: list[str]

    def consumed_per_source(self, consumed_samples: int, passed_over: PassedOver = NOTHING) -> dict[str, int]:
        """Training samples of each source among the first `consumed_samples` that were read."""
        consumed, position = self.train.samples.consumed, passed_over.position(consumed_samples)
        found = consumed(position)
        for first, samples in passed_over.before(position).windows:
            begun, ended = consumed(first), consumed(first + samples)
            found = {name: count - ended[name] + begun[name] for name, count in found.items()}
        return found


def build_data(run: RunConfig, checked: CheckedData | None = None) -> Data:
    """The streams of a run.

    Args:
        checked: what check_data found; by default it is called here.
    Raises: DataError as check_data does, or when a file has gone since.
    """
    checked = checked or check_data(run)
    if checked.catalogue is None:
        train, validation, names = _mock(run, "train"), _mock(run, "valid"), ["mock"]
    else:
        assert checked.validation is not None, "check_data finds it beside the catalogue"
        names, held_out = checked.source_names, [checked.validation]
        # Seed 0 always: runs of different seeds are compared on the same held-out samples. The same shares throughout.
        if checked.rows:
            train = _of_rows(run, checked, "train", checked.phases, seed=run.run.seed, reshuffle=True)
            validation = _of_rows(run, checked, "valid", held_out, seed=0, reshuffle=False)
        else:
            train = _mixed(run, checked, "train", checked.phases, seed=run.run.seed)
            validation = _mixed(run, checked, "valid", held_out, seed=0)
    return Data(
        train=train,
        validation=validation,
        identity=checked.identity,
        tokenizer=checked.tokenizer,
        source_names=names,
    )


def _mock(run: RunConfig, stream: str) -> SampleStream:
    model = run.model
    samples = MockSamples(
        vocab_size=model.vocab_size, seq_length=model.seq_length, seed=run.run.seed, stream=stream,
        by_document=run.data.document_mask, lengths=run.step_sizes.lengths() if stream == "train" else (),
    )  # fmt: skip
    if run.stage.kind is StageKind.vision and model.vision is not None:
        size, most = model.vision.encoder.image_size, model.vision.resampler.max_frames
        return SampleStream(MockImages(text=samples, image_size=size, max_frames=most), model.vocab_size)
    return SampleStream(samples, model.vocab_size)


def _of_rows(
    run: RunConfig, checked: CheckedData, split: str, phases: Sequence[Phase], *, seed: int, reshuffle: bool
) -> SampleStream:
    sources = checked.rows[split]
    mixture = PhasedMixture({name: rows.num_rows for name, rows in sources.items()}, phases, seed)
    samples = RowSamples(sources, checked.source_names, mixture, seed, reshuffle)
    return SampleStream(samples, run.model.vocab_size)


def _mixed(run: RunConfig, checked: CheckedData, split: str, phases: Sequence[Phase], *, seed: int) -> SampleStream:
    assert checked.catalogue is not None, "synthetic tokens have no sources"
    sources, seq_length = checked.catalogue.sources, run.model.seq_length
    streams = {name: sources[name].tokens(split) for name in names_of(phases)}
    sizes = {name: num_samples(len(tokens), seq_length) for name, tokens in streams.items()}
    # Held-out samples have the longest length, so that one number is followed through the whole run.
    mixture = PhasedMixture(sizes, phases, seed, parts_of(run) if split == "train" else WHOLE)
    samples = MixedSamples(
        streams, checked.source_names, mixture, seq_length, seed, reshuffle=split == "train",
        by_document=run.data.document_mask,
    )  # fmt: skip
    return SampleStream(samples, run.model.vocab_size)


def micro_batch_samples(
    consumed_samples: int, *, global_batch_size: int, micro_batch_size: int, dp: int, dp_index: int
) -> list[range]:
    """TokenSample numbers of each micro-batch of one step on one rank.

    Raises: ValueError when global_batch_size is no multiple of micro_batch_size * dp.
    """
    if global_batch_size % (micro_batch_size * dp) or not 0 <= dp_index < dp:
        raise ValueError(f"global batch {global_batch_size} over micro-batch {micro_batch_size} x dp {dp}, {dp_index=}")
    starts = range(consumed_samples, consumed_samples + global_batch_size, micro_batch_size)
    return [range(start, start + micro_batch_size) for start in starts[dp_index::dp]]
