"""What a run reads, source by source: of a data folder, or of a plan whose sources are not on disk yet."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.config.data import DataKind
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.data.blend import phases_of, require_epochs, uses, validation_of
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import open_catalogue, rows_of
from gpt4moe.data.indexed_writer import token_dtype
from gpt4moe.data.manifest import SPLITS
from gpt4moe.data.mixture import Phase, names_of
from gpt4moe.data.samples import num_samples
from gpt4moe.errors import DataError


def overview(run: RunConfig) -> dict[str, Any]:
    """{"sources": [SourceUse as a dictionary with disk_bytes, ...], "phases", "batches", totals}, over training.steps.

    Raises: DataError for synthetic tokens, a folder that is missing though not every source has `tokens`, a source
    that is not there, and one that would be read more often than its max_epochs.
    """
    if run.data.kind is DataKind.mock:
        raise DataError("data=mock is synthetic: it has no sources.", "Choose data=demo or data=gpt4_13t.")
    catalogue = _catalogue(run)
    tokens = _train_tokens(run, catalogue)
    phases = phases_of(run, tokens)
    rows = _rows(run, catalogue, phases)
    phases = phases_of(run, tokens | rows)
    found, sizes = uses(run, tokens, phases, rows), run.step_sizes
    validation_of(run, tokens, phases)  # refuses a source that is not there
    require_epochs(run, found)
    sources = [
        dataclasses.asdict(use) | {"disk_bytes": _disk_bytes(run, catalogue, use.source, use.tokens)} for use in found
    ]
    return {
        "is_planned": catalogue is None,
        "folders": run.data.folders,
        "sources": sources,
        "phases": [{"first_sample": phase.first_sample, "shares": phase.shares} for phase in phases],
        "batches": [dataclasses.asdict(span) | {"steps": steps} for span, steps in sizes.within(run.training.steps)],
        "tokens": sum(source["tokens"] for source in sources),
        "samples": sum(source["samples"] for source in sources),
        "tokens_read": sum(source["tokens_read"] for source in sources),
        "disk_bytes": sum(source["disk_bytes"] for source in sources),
    }


def take_data(plan: PlanConfig) -> None:
    """Sets what a plan takes from its data: training.steps of its epochs, distinct_tokens, data_refusals.

    Raises: DataError.
    """
    if plan.epochs is not None:
        plan.train_tokens(tokens_of_epochs(plan, plan.epochs))
    plan.distinct_tokens = distinct_tokens(plan)
    if plan.distinct_tokens is not None and any(one.max_epochs is not None for one in plan.data.chosen.values()):
        try:
            overview(plan)
        except DataError as error:
            plan.data_refusals = [f"{error.cause} {error.cure}"]


def tokens_of_epochs(run: RunConfig, epochs: float) -> float:
    """Tokens of so many passes over the data, in samples of model.seq_length: a source counts as often as its own
    data.sources.NAME.epochs says. Conversations count as the rows that they are packed into.

    Raises: DataError where that is no number: synthetic tokens, shares or phases, unpacked rows that are not on disk.
    """
    if run.data.kind is DataKind.mock:
        raise DataError(
            f"epochs={epochs:g}: data=mock is synthetic and has no end.",
            "Set data=demo data.path=FOLDER; for data that is not on disk yet data=demo "
            "'+data.sources.mine={tokens: 2e8}'.",
        )
    shared = next((name for name, source in run.data.chosen.items() if source.share is not None), None)
    if shared is not None or run.data.phases:
        what = "data.phases" if shared is None else f"data.sources.{shared}.share"
        raise DataError(
            f"epochs={epochs:g} with {what}: sources are read in shares, so a pass over the data is no number.",
            "Set tokens=... or training.steps=... instead.",
        )
    catalogue = _catalogue(run)
    if catalogue is None and run.has_rows and not run.data.pack:
        raise DataError(
            f"epochs={epochs:g} with data.pack=false: how many rows the data has is known once it is on disk.",
            "Set data.pack=true, or training.steps=... instead.",
        )
    tokens = _train_tokens(run, catalogue)
    names = list(run.data.chosen or tokens)
    rows = _rows(run, catalogue, phases_of(run, tokens))
    each = {name: run.data.chosen[name].epochs if name in run.data.chosen else 1.0 for name in names}
    length = run.model.seq_length
    samples = {name: rows.get(name) or max(1, num_samples(int(tokens[name]), length)) for name in names}
    return epochs * length * sum(samples[name] * each[name] for name in names)


def distinct_tokens(run: RunConfig) -> float | None:
    """Training tokens of the chosen sources, each counted once however often it is read: what a plan finds on disk.

    None where neither the configuration nor a folder says: synthetic tokens, or a folder that is not there yet.
    Raises: DataError for a folder that cannot be read, or has not the chosen sources.
    """
    is_known = bool(run.data.chosen) and all(source.tokens is not None for source in run.data.chosen.values())
    if run.data.kind is DataKind.mock or not (is_known or any(Path(folder).exists() for folder in run.data.folders)):
        return None
    tokens, chosen = _train_tokens(run, _catalogue(run)), list(run.data.chosen)
    missing = next((name for name in chosen if name not in tokens), None)
    if missing is not None:
        raise DataError(
            f"data.sources.{missing} is no source of {', '.join(map(str, run.data.folders))}, which has "
            f"{', '.join(sorted(tokens))}.",
            "Name sources that are there, or give the tokens of each: '++data.sources.mine={tokens: 2e8}'.",
        )
    return float(sum(tokens[name] for name in chosen or tokens))


def _train_tokens(run: RunConfig, catalogue: Catalogue | None) -> dict[str, float]:
    """Of each source: as the catalogue has them, else as the configuration says."""
    if catalogue is not None:
        return dict(catalogue.train_tokens())
    return {name: one.tokens or 0 for name, one in run.data.chosen.items()}


def _catalogue(run: RunConfig) -> Catalogue | None:
    """None: nothing is on disk, and every source has its tokens in the configuration."""
    is_planned = bool(run.data.chosen) and all(source.tokens is not None for source in run.data.chosen.values())
    if is_planned and not any(Path(folder).exists() for folder in run.data.folders):
        return None
    return open_catalogue(run)


def _rows(run: RunConfig, catalogue: Catalogue | None, phases: Sequence[Phase]) -> dict[str, int]:
    """Rows of an epoch of each source that has them."""
    found = {} if catalogue is None else rows_of(run, catalogue, {"train": names_of(phases)})
    return {name: rows.num_rows for name, rows in found.get("train", {}).items()}


def _disk_bytes(run: RunConfig, catalogue: Catalogue | None, name: str, tokens: float) -> int:
    """Of the tokens, both splits; a plan has no held-out text yet."""
    if catalogue is None:
        return int(tokens) * token_dtype(run.model.vocab_size).itemsize
    manifest = catalogue.sources[name].manifest
    return sum(shard.tokens * np.dtype(shard.dtype).itemsize for split in SPLITS for shard in manifest.shards(split))
