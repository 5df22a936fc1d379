"""The checkpoints of a run folder: which there are, which is the latest, which stay."""

import shutil
from pathlib import Path

from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.errors import CheckpointError


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps with a committed checkpoint, ascending; folders without a manifest do not count."""
    found = [path.parent.name for path in checkpoints.glob(f"step-*/{NAME}")]
    return sorted(int(name.removeprefix("step-")) for name in found)


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, or the latest of a run folder.

    Raises: CheckpointError when it is neither.
    """
    if (path / NAME).exists():
        return path
    steps = committed_steps(path / "checkpoints")
    if not steps:
        raise CheckpointError(
            f"{path} is neither a step folder nor a run folder with a checkpoint.",
            "Give runs/NAME, or runs/NAME/checkpoints/step-00000100.",
        )
    return step_folder(path / "checkpoints", steps[-1])


def prune(checkpoints: Path, *, keep: int, keep_every: int) -> list[int]:
    """Removes all but the newest `keep` and those of steps divisible by `keep_every`; 0 keeps all, or none for good.

    The manifest goes first: a folder half removed is no checkpoint any more. Returns the steps removed.
    """
    if keep == 0:
        return []
    old = [step for step in committed_steps(checkpoints)[:-keep] if not keep_every or step % keep_every]
    for step in old:
        folder = step_folder(checkpoints, step)
        (folder / NAME).unlink()
        shutil.rmtree(folder)
    return old
