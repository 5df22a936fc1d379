"""The base of a checkpoint that holds adapters alone: the checkpoint of the frozen weights beside them. No torch.

    manifest.json of the adapters  --base: folder, sha256 of the base's manifest.json-->  the base, opened and compared

A manifest has the hashes of its files, so its own hash stands for every weight.
"""

import hashlib
from pathlib import Path

from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.retention import find_checkpoint, renamed
from gpt4moe.errors import CheckpointError


def reference(folder: Path) -> dict[str, str]:
    """What a manifest says of its base: where it is, and its hash."""
    return {"folder": str(folder.resolve()), "sha256": _hash(folder)}


def base_folder(manifest: Manifest, elsewhere: str | None = None) -> Path:
    """The folder of a checkpoint's base, also where its run renamed it (retention.set_aside).

    Args:
        elsewhere: a step or run folder to look at if the base is gone from where it was (checkpoint.load).
    Raises: CheckpointError when the base is at no such place, or has changed.
    """
    assert manifest.base is not None
    folder, wanted = Path(manifest.base["folder"]), manifest.base["sha256"]
    for place in (folder, *renamed(folder)):
        if (place / NAME).exists() and _hash(place) == wanted:
            return place
    if elsewhere is not None or not (folder / NAME).exists():
        if elsewhere is None:
            raise CheckpointError(
                f"The base of these adapters is gone: {folder}.", "Put it back, or say where it is: --base of "
                "tools/convert_checkpoint.py, or checkpoint.load where the run goes on.",
            )  # fmt: skip
        folder = find_checkpoint(Path(elsewhere))
    if _hash(folder) != wanted:
        raise CheckpointError(
            f"{folder} is not the base of these adapters: the sha256 of its {NAME} is {_hash(folder)[:12]}..., not "
            f"{wanted[:12]}...",
            "Give the checkpoint that the adapters were trained on.",
        )
    return folder


def refuse_adapters(folder: Path, manifest: Manifest) -> None:
    """Raises: CheckpointError when a checkpoint holds adapters alone, for what needs a whole model."""
    if manifest.base is not None:
        raise CheckpointError(
            f"{folder} holds adapters alone, beside the weights of {manifest.base['folder']}.",
            f"Merge the two: python tools/convert_checkpoint.py merge {folder} OUT.",
        )


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
