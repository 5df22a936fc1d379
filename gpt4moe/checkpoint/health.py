"""Which checkpoints are healthy, and which are suspect: what was found about one after, or while, it was written.

A manifest is never changed once it is written. So what is found goes into a file beside it: suspect.json, with the
reasons in the order in which they were found. A checkpoint without it is healthy. No torch.
"""

import json
import os
from pathlib import Path

from gpt4moe.durable import sync_folder

SUSPECT = "suspect.json"
"""A file of this name in a step folder: {"reasons": [...]}."""
_MOST_REASONS = 20


def reasons(folder: Path) -> list[str]:
    """Why a checkpoint is suspect; none: it is healthy."""
    path = folder / SUSPECT
    try:
        found = json.loads(path.read_bytes())["reasons"]
        return [str(reason) for reason in found] or [f"{path.name} has no reason"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return [f"{path.name} cannot be read"]


def mark(folder: Path, reason: str) -> None:
    """Marks a checkpoint as suspect; one that is being saved too, whose folder is there. Raises: OSError."""
    before = reasons(folder)
    if reason in before or len(before) >= _MOST_REASONS:
        return
    draft = folder / f"{SUSPECT}.tmp"
    with draft.open("w") as file:
        json.dump({"reasons": [*before, reason]}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / SUSPECT)
    sync_folder(folder)
