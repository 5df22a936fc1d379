"""What must stay the same over all launches of a run, and how far data may differ: in what was not read yet.

phases of the data       0 ......... | 2,000 ....... | 5,000 ...
hash of all up to each   h0          | h1            | h2          those of two launches: equal up to a phase,
read so far              0 ............ 2,300                      which must begin where nothing was read
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from gpt4moe.config.load import config_to_dict
from gpt4moe.config.run import RunConfig
from gpt4moe.config.stage import StageKind
from gpt4moe.data.blend import settled_samples
from gpt4moe.errors import ConfigError

ENCODER = "encoder"
"""Key of an identity: what the files of an encoder's folder say (architecture.encoder_folder.encoder_identity)."""

PHASES = "phases"
"""Key of an identity, of a run with data.phases: [[first sample, hash of the data up to this phase], ...]; the last
hash is "data". Runs of before 2026-11-30 have none."""

_OPTIONAL: dict[str, tuple[Any, str]] = {
    "batch_ramp": ([], "training.batch_ramp"), "length_ramp": ([], "training.length_ramp"),
    "stage": (StageKind.pretrain.value, "stage.kind"),
    "train": ([], "stage.train"), "lora": (None, "stage.lora"), "document_mask": (False, "data.document_mask"),
}  # fmt: skip
"""Key of an identity -> its default, which is not written, and the configuration's key."""


def identity_of(run: RunConfig, data_identity: dict[str, str]) -> dict[str, Any]:
    """What must stay the same over all launches of a run: model, tokenizer, data, seed, batch sizes, lengths of
    samples, stage, what is trained, document mask, the files of an encoder's folder.

    The ramps and the last four are written only if they are not the default: run folders and checkpoints made before
    have none.

    Args:
        data_identity: CheckedData.identity; with "encoder" once the encoder's files were read (training.encoder_files).
    """
    config = config_to_dict(run)
    lora = config["stage"]["lora"] | {"targets": sorted(run.stage.lora.targets)}
    optional = {
        **{key: config["training"][key] for key in ("batch_ramp", "length_ramp")},
        "stage": run.stage.kind.value, "train": sorted(run.stage.train),
        "lora": lora if run.stage.lora.rank else None, "document_mask": run.data.document_mask,
    }  # fmt: skip
    # A text model says nothing of vision: its checkpoints were written before there was the key.
    without = {"name", "lora"} | ({"vision"} if run.model.vision is None else set())
    return {
        "model": {key: value for key, value in config["model"].items() if key not in without},
        "data": data_identity["data"],
        "tokenizer": data_identity["tokenizer"],
        "seed": run.run.seed,
        "global_batch_size": run.training.global_batch_size,
        **{key: value for key, value in optional.items() if value != _OPTIONAL[key][0]},
        **{key: json.loads(data_identity[key]) for key in (PHASES, ENCODER) if key in data_identity},
    }


def comparable(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two identities in one form, without what is not compared: PHASES (differs_from compares them), an encoder's files
    where one of them does not say them (a run of before 2026-11-30; a launch that has not read them yet), and where the
    folder lies whose files are said."""
    is_said = ENCODER in theirs
    sides = [{key: value for key, value in side.items() if key != PHASES} for side in (theirs, ours)]
    if not (is_said and ENCODER in ours):
        sides = [{key: value for key, value in side.items() if key != ENCODER} for side in sides]
    if is_said:
        sides = [_without_folder(side) for side in sides]
    return _in_one_form(sides[0]), _in_one_form(sides[1])


def _without_folder(identity: dict[str, Any]) -> dict[str, Any]:
    vision = identity["model"].get("vision")
    if vision is None:
        return identity
    encoder = {key: value for key, value in vision["encoder"].items() if key != "folder"}
    return identity | {"model": identity["model"] | {"vision": vision | {"encoder": encoder}}}


def differs_from(theirs: dict[str, Any], ours: dict[str, Any]) -> int | None:
    """The first sample of the order from which on the data of two identities differ; None: nowhere."""
    if theirs.get("data") == ours["data"]:
        return None
    chains = [_chain(theirs), _chain(ours)]
    shared = {digest for _, digest in chains[0]} & {digest for _, digest in chains[1]}
    if not shared:
        return 0
    # Of an identity without PHASES the one hash may stand for several phases of the other: all of those are shared.
    last = [max(n for n, (_, digest) in enumerate(chain) if digest in shared) for chain in chains]
    following = [chain[at + 1][0] for chain, at in zip(chains, last, strict=True) if at + 1 < len(chain)]
    return min(following, default=0)


def _chain(identity: dict[str, Any]) -> list[tuple[int, Any]]:
    """PHASES, where it is of this data: a converted checkpoint has another name for it."""
    match identity:
        case {"phases": [*_, [_, digest]] as chain, "data": data} if digest == data:
            return [(first, digest) for first, digest in chain]
    return [(0, identity.get("data"))]


def with_our_future(
    theirs: dict[str, Any], ours: dict[str, Any], run: RunConfig, drawn_samples: int
) -> dict[str, Any]:  # fmt: skip
    """Their identity; with our data, where both are the same in all that was read.

    Args:
        run: ours.
        drawn_samples: where in the order theirs is.
    """
    first = differs_from(theirs, ours)
    is_same = first is not None and first >= max(1, settled_samples(run, drawn_samples))
    return theirs | {"data": ours["data"]} if is_same else theirs


def refuse_other_identity(
    theirs: dict[str, Any], ours: dict[str, Any], folder: Path, *, run: RunConfig, drawn_samples: int
) -> None:
    """Raises: ConfigError when the identity of the run in `folder` and ours differ, naming the values. Data may differ
    in what was not read yet.

    Args:
        run: ours.
        drawn_samples: where in the order the run in `folder` is.
    """
    first = differs_from(theirs, ours)
    theirs, ours = comparable(with_our_future(theirs, ours, run, drawn_samples), ours)
    found = [(key, was, now) for key, was, now in differences(theirs, ours) if key != "run_id"]
    if not found:
        return
    named = {"seed": "run.seed", "global_batch_size": "training.global_batch_size"}
    named |= {key: name for key, (_, name) in _OPTIONAL.items()}
    named[f"{ENCODER}.weights"] = "other weights in model.vision.encoder.folder: sha256"
    groups = [key.partition(".")[0] for key, *_ in found]
    keys = [
        named.get(key) or named.get(group, group) + key.removeprefix(group)
        for group, (key, *_) in zip(groups, found, strict=True)
    ]
    shown = [f"{key} {_short(was)}, now {_short(now)}" for key, (_, was, now) in zip(keys[:3], found[:3], strict=True)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    is_encoder = found[0][0].startswith(f"{ENCODER}.")
    weights = (
        f", with checkpoint.load={folder} to begin with its weights"
        if is_encoder or groups[0] in ("stage", "train", "lora")
        else ""
    )
    if groups == ["data"] and first:
        raise _past_changed(folder, run, drawn_samples, first)
    if "data" in groups:
        raise ConfigError(
            f"The run in {folder} was started with {'; '.join(shown)}{more}: its sources, shares or phases changed.",
            "Give the values of data.* again (the last file of starts/ has them), and the files as they were. A source "
            "that was extended since has its samples in another order: choose another run.name, with "
            f"checkpoint.load={folder} to begin with its weights.",
        )
    again = "put the first files back" if is_encoder else "give the first values again (resolved.yaml has them)"
    raise ConfigError(
        f"The run in {folder} was started with {'; '.join(shown)}{more}.",
        f"Choose another run.name for a new run{weights}, or {again}.",
    )


def _past_changed(folder: Path, run: RunConfig, drawn_samples: int, first: int) -> ConfigError:
    tokens_until, settled = run.step_sizes.tokens_until, settled_samples(run, drawn_samples)
    begun = (
        f", and the order of training.length_ramp is settled to sample {settled:,}" if settled > drawn_samples else ""
    )
    return ConfigError(
        f"The run in {folder} has read {drawn_samples:,} samples ({tokens_until(drawn_samples):,} tokens){begun}: its "
        f"data.phases, or sources of theirs, differ from sample {first:,} ({tokens_until(first):,} tokens) on.",
        f"Let a phase that is new or changed begin at from_tokens={tokens_until(settled)} or later, and give those "
        "before as they were (the last file of starts/ has them). To change what was read, choose another run.name, "
        f"with checkpoint.load={folder} to begin with its weights.",
    )


def _in_one_form(identity: dict[str, Any]) -> dict[str, Any]:
    """With defaults written out: equal runs that were written differently are equal."""
    found = {key: default for key, (default, _) in _OPTIONAL.items()} | identity
    lora, size = found["lora"], found.get("global_batch_size")  # a converted folder has no batch
    if lora:  # run folders of before 2026-11-30 have the patterns in the order that they were given in
        found["lora"] = lora | {"targets": sorted(lora["targets"])}
    if not found["batch_ramp"]:  # else a level without a size of its own has the ramp's
        found["length_ramp"] = [
            level | {"global_batch_size": level.get("global_batch_size") or size} for level in found["length_ramp"]
        ]
    return found


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, before, after) of every leaf that differs."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        was, now, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{path}.")
        elif was != now:
            found.append((path, was, now))
    return found


def _short(value: Any) -> str:
    """The first characters of a hash; other values whole."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == hashlib.sha256().digest_size * 2 else text
