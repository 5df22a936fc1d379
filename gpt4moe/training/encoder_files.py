"""The files of a frozen encoder's folder as part of a run's identity: who changes them changes the run.

Rank 0 hashes them once a launch, every rank gets the hashes, and each checkpoint has them. A run folder that was begun
before 2026-11-30 has none: it goes on unchecked, and the log says so.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gpt4moe.architecture.encoder_folder import encoder_identity
from gpt4moe.config.vision import EncoderKind
from gpt4moe.parallel.agreement import broadcast_text, raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.identity import ENCODER
from gpt4moe.training.launch import Launch

logger = logging.getLogger(__name__)

_SECONDS = 5.0


def with_encoder_files(launch: Launch, groups: ProcessGroups) -> Launch:
    """`launch` with "encoder" in its data's identity, where the model has an encoder of a folder. Collective.

    Raises: ConfigError on every rank when a file is gone or damaged.
    """
    vision, found = launch.run.model.vision, ""
    if vision is None or vision.encoder.kind is not EncoderKind.folder:
        return launch
    folder = Path(vision.encoder.folder or "")
    with raise_together(groups):
        if groups.is_first_rank:
            found = json.dumps(encoder_identity(folder, _logged(folder)))
            if launch.folder.is_begun and ENCODER not in launch.folder.read_identity():
                logger.warning(
                    "the run was begun before runs knew the files of model.vision.encoder.folder: nothing says whether "
                    "%s has the ones it began with",
                    folder,
                )
    identity = launch.data.identity | {ENCODER: broadcast_text(found, groups)}
    return replace(launch, data=replace(launch.data, identity=identity))


def _logged(folder: Path) -> Callable[[int, int], None]:
    """A line every few seconds, for weights of many gigabytes."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            logger.info("hashing the weights of %s: %.1f of %.1f GB", folder, done / 1e9, total / 1e9)

    return progress
