"""Checks the data of a run before anything expensive starts: files, vocabulary, tokenizer, sizes. No torch.

check_data reads the manifests and hashes the tokenizer once a launch. Later steps get the result as CheckedData.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.data import DataKind
from gpt4moe.config.run import RunConfig
from gpt4moe.config.stage import StageKind
from gpt4moe.data.blend import phases_of, require_epochs, uses, validation_of
from gpt4moe.data.catalogue import Catalogue, require_tokenizer_file
from gpt4moe.data.conversations import lay_out
from gpt4moe.data.manifest import SPLITS
from gpt4moe.data.mixture import Phase, names_of
from gpt4moe.data.rows import RowLayout, Rows, TextRows
from gpt4moe.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedData:
    """The result of check_data: facts of a run's data."""

    identity: dict[str, str]
    """Hashes that must be the same on a restart: "data", of the tokens and their shares; "tokenizer". They do not
    depend on where the folder lies. "phases", JSON, of a run with phases: [[first sample, "data" up to it], ...], for
    those that begin after what was read may change (training.identity). Training adds "encoder" to them, JSON, where a
    model has an encoder of a folder."""
    tokenizer: Path | None = None
    """data.tokenizer, or the data folder's own; None for synthetic tokens without one."""
    catalogue: Catalogue | None = None
    """The sources; None for synthetic tokens."""
    phases: Sequence[Phase] = ()
    """Shares of the catalogue's sources."""
    validation: Phase | None = None
    """Shares of held-out samples; None for synthetic tokens."""
    rows: dict[str, dict[str, Rows]] = field(default_factory=dict)
    """Where samples are rows of whole documents (stage=sft, stage=vision): split -> source -> its rows."""
    warnings: Sequence[str] = ()
    """What a new run is refused for, of one that is not new."""

    @property
    def source_names(self) -> list[str]:
        """Every source that is read, sorted."""
        return names_of([*self.phases, *([] if self.validation is None else [self.validation])])


def check_data(run: RunConfig, *, is_new: bool = True) -> CheckedData:
    """Looks at every file that the run will read.

    Args:
        is_new: False: the run has begun, perhaps before conversations were refused, or is looked at alone.
    Raises: DataError for missing or damaged files, another vocabulary or tokenizer, and for a source that is unknown,
    short, or would be read more often than it may.
    """
    if run.data.kind is DataKind.mock:
        return _check_mock(run)
    catalogue = open_catalogue(run)
    vocabulary, folder = catalogue.vocabulary, catalogue.folders[0]
    if vocabulary.vocab_size != run.model.vocab_size:
        raise DataError(
            f"model.vocab_size={run.model.vocab_size}, but the data of {folder} has a vocabulary of "
            f"{vocabulary.vocab_size}.",
            f"Set model.vocab_size={vocabulary.vocab_size}, or make data of the other vocabulary.",
        )
    path = _tokenizer_of(run, catalogue)
    require_tokenizer_file(path)
    tokenizer_hash = file_sha256(path)
    if tokenizer_hash != vocabulary.tokenizer_sha256:
        raise DataError(
            f"The tokenizer {path} is not the one that made the data of {folder}.",
            "Leave data.tokenizer unset, or make the data again with this tokenizer (tools/tokenize_corpus.py).",
        )
    known = catalogue.train_tokens()
    phases = phases_of(run, known)
    validation = validation_of(run, known, phases)
    read = dict(zip(SPLITS, (names_of(phases), names_of([validation])), strict=True))
    learned = _conversations_as_text(run, catalogue, sorted({name for some in read.values() for name in some}))
    if learned and is_new:
        raise DataError(*learned)
    rows = rows_of(run, catalogue, read)
    for split, names in ({} if rows else read).items():
        for name in names:
            tokens = len(catalogue.sources[name].tokens(split))
            _require_length(name, split, tokens=tokens, seq_length=run.model.seq_length)
    counts = {name: found.num_rows for name, found in rows.get("train", {}).items()}
    if counts:  # a source's weight is what there is to draw of it
        phases = phases_of(run, known | counts)
        validation = validation_of(run, known, phases)
    require_epochs(run, uses(run, known, phases, counts))
    identity = _identity(run, catalogue, phases, has_rows=bool(rows)) | {"tokenizer": tokenizer_hash}
    return CheckedData(
        identity=identity,
        tokenizer=path,
        catalogue=catalogue,
        phases=phases,
        validation=validation,
        rows=rows,
        warnings=[learned[0]] if learned else [],
    )


def _identity(run: RunConfig, catalogue: Catalogue, phases: Sequence[Phase], *, has_rows: bool) -> dict[str, str]:
    """CheckedData.identity of the tokens."""
    form = f"/{'packed' if run.data.pack else 'padded'}/{run.data.long_rows.value}" if has_rows else ""
    form += f"/{run.data.max_images} images" if run.stage.kind is StageKind.vision else ""
    so_far = [
        (phase.first_sample, catalogue.content_hash(phases[: number + 1]) + form) for number, phase in enumerate(phases)
    ]
    identity = {"data": so_far[-1][1]}
    return identity | ({"phases": json.dumps(so_far)} if len(phases) > 1 else {})


def rows_of(run: RunConfig, catalogue: Catalogue, read: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Rows]]:
    """Split -> source -> its rows; empty where samples are stretches of a stream.

    Args:
        read: split -> names of its sources.
    """
    names = sorted({name for some in read.values() for name in some})
    _require_kinds(run, catalogue, names)
    if not run.has_rows:
        return {}
    # Held-out documents are laid out as for seed 0, so that runs of several seeds have the same.
    return {
        split: {name: _rows(run, catalogue, name, split, seed=run.run.seed if split == "train" else 0) for name in some}
        for split, some in read.items()
    }


def _rows(run: RunConfig, catalogue: Catalogue, name: str, split: str, *, seed: int) -> Rows:
    source, layout = catalogue.sources[name], RowLayout(
        seq_length=run.model.seq_length, seed=seed, is_packed=run.data.pack, long_rows=run.data.long_rows,
        padding_id=catalogue.vocabulary.eos_id,
    )  # fmt: skip
    if source.manifest.images is not None:
        from gpt4moe.data.image_rows import (  # Pillow: a tenth of a second that others need not
            ImageView,
            lay_out_images,
        )

        vision = run.model.vision
        assert vision is not None, "RunConfig.validate refuses stage=vision without model.vision"
        view = ImageView(
            size=vision.encoder.image_size, max_frames=vision.resampler.max_frames, max_images=run.data.max_images
        )  # fmt: skip
        return lay_out_images(source, split, view, layout)
    if run.stage.kind is StageKind.sft:
        return lay_out(source, split, layout)
    tokens = source.tokens(split)
    _require_length(name, split, tokens=len(tokens), seq_length=layout.seq_length)
    return TextRows(tokens, layout.seq_length, by_document=layout.is_packed)


def _require_kinds(run: RunConfig, catalogue: Catalogue, names: Sequence[str]) -> None:
    """Raises: DataError for sources that the stage does not read."""
    manifests = {name: catalogue.sources[name].manifest for name in names}
    where, stage = catalogue.folders[0], f"stage={run.stage.kind.value}"
    pictured = [name for name, manifest in manifests.items() if manifest.images is not None]
    chat = next((name for name in names if manifests[name].is_chat), None)
    if run.stage.kind is StageKind.sft:
        plain = next((name for name in names if not manifests[name].is_chat), None)
        if plain is not None:
            raise DataError(
                f"{stage}, and source {plain} of {catalogue.sources[plain].folder.parent} is plain text: nothing says "
                "which of its tokens are the assistant's.",
                "Make conversations with tools/prepare_chat.py, name the sources that are (++data.sources.NAME=1), or "
                "set stage=pretrain.",
            )
    elif run.stage.kind is StageKind.vision:
        if chat is not None:
            raise DataError(
                f"{stage}, and source {chat} has conversations, which this stage does not read.",
                "Name the other sources (++data.sources.NAME=1).",
            )
        if not pictured:
            raise DataError(
                f"{stage}, and no source of {where} that is read has images: {', '.join(names)}.",
                "Make one with tools/prepare_media.py, or name one (++data.sources.NAME=1).",
            )
    elif pictured:
        raise DataError(
            f"{stage}, and source {pictured[0]} has images: its image tokens would be learned as text.",
            "Set stage=vision, or name the other sources (++data.sources.NAME=1).",
        )


def _conversations_as_text(run: RunConfig, catalogue: Catalogue, names: Sequence[str]) -> tuple[str, str] | None:
    """(cause, cure) where pre-training would learn conversations and nothing says that it shall."""
    chat = next((name for name in names if catalogue.sources[name].manifest.is_chat), None)
    if chat is None or run.stage.kind is not StageKind.pretrain or run.data.chat_as_text:
        return None
    return (
        f"stage=pretrain, and source {chat} has conversations: every turn of them would be learned, the user's too.",
        "Set stage=sft to learn the assistant's, data.chat_as_text=true to learn all of it as text, or name the other "
        "sources (++data.sources.NAME=1).",
    )


def _check_mock(run: RunConfig) -> CheckedData:
    """Synthetic tokens: at most a tokenizer is read."""
    if run.stage.kind is StageKind.sft:
        raise DataError("stage=sft with data=mock: synthetic tokens are no conversations.", "Set data.path=FOLDER.")
    if run.data.tokenizer is None:
        return CheckedData(identity={"data": "mock", "tokenizer": "none"})
    path = Path(run.data.tokenizer)
    if not path.is_file():
        raise DataError(f"data.tokenizer={path} is missing.", "Leave data.tokenizer unset for data=mock.")
    return CheckedData(identity={"data": "mock", "tokenizer": file_sha256(path)}, tokenizer=path)


def open_catalogue(run: RunConfig) -> Catalogue:
    """The sources of data.path. Raises: DataError, as Catalogue.open."""
    return Catalogue.open([Path(folder) for folder in run.data.folders])


def tokenizer_path(run: RunConfig) -> Path | None:
    """CheckedData.tokenizer, where the tokens themselves are not needed. Raises: DataError for a damaged manifest."""
    if run.data.tokenizer is not None or run.data.kind is DataKind.mock:
        return None if run.data.tokenizer is None else Path(run.data.tokenizer)
    return open_catalogue(run).tokenizer


def _tokenizer_of(run: RunConfig, catalogue: Catalogue) -> Path:
    return Path(run.data.tokenizer) if run.data.tokenizer is not None else catalogue.tokenizer


def _require_length(source: str, split: str, *, tokens: int, seq_length: int) -> None:
    if tokens < seq_length + 1:
        raise DataError(
            f"Source {source} has {tokens} {split} tokens; one sample of model.seq_length={seq_length} takes "
            f"{seq_length + 1}.",
            f"Set model.seq_length to {max(1, tokens - 1)} or less, name the other sources only "
            "(++data.sources.NAME=SHARE), or give more text.",
        )
