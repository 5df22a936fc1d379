"""The run that is drilled: a model of 50,000 parameters on two or more ranks, its own small data, and its files.

It is as small as it can be and still have every part: experts on several ranks, evaluations, asynchronous saves,
retention, data with checksums. Its launches and saves are what a drill needs, not its steps.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.checkpoint.retention import committed_steps, step_folder
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.drill.kinds import RECOMPUTE_EVERY
from gpt4moe.durable import sync_folder
from gpt4moe.errors import ConfigError

MARKER = ".gpt4moe-drill"
"""Written first into the folder of a drill: only a folder that has it is made anew."""
RESULT = "drill.json"
DRILLED, PLAIN, NOTES, LOGS = "drilled", "plain", "notes", "logs"
_DATA = "data"
_OWN = (DRILLED, PLAIN, NOTES, LOGS, _DATA, RESULT)
"""All that a drill writes into its folder. Nothing else in it is ever removed."""
EVERY = 4
"""Steps between two saves."""
_VOCAB_SIZE = 264
_SMALL = (
    "+experiment=tiny", "model.num_layers=2", "model.hidden_size=32", "model.seq_length=32",
    f"model.vocab_size={_VOCAB_SIZE}", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=32",
    "training.global_batch_size=4", "training.micro_batch_size=1", "training.eval_every=5", "training.eval_samples=4",
    "training.check_replicas_every=10", "optimizer.lr=0.002", "schedule.warmup_steps=2", "schedule.total_steps=1000",
    "tracking.wandb=disabled", f"checkpoint.every={EVERY}", "checkpoint.keep=3",
    f"resilience.recompute_every={RECOMPUTE_EVERY}",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Args: folder: everything of the drill. ranks: dp = ep = ranks. watchdog_seconds: resilience.hang_seconds."""

    folder: Path
    ranks: int
    steps: int
    watchdog_seconds: float = 8.0
    more: Sequence[str] = ()

    @property
    def data(self) -> Path:
        return self.folder / _DATA

    def run_folder(self, name: str) -> Path:
        return self.folder / name

    def overrides(self, name: str) -> list[str]:
        """The same for every launch of the run `name`."""
        own = (f"run.root={self.folder}", f"run.name={name}", f"data.path={self.data}", f"training.steps={self.steps}")
        layout = (f"parallel.ep={self.ranks}", f"resilience.hang_seconds={self.watchdog_seconds:g}")
        return [*_SMALL, *own, *layout, *self.more]

    def build(self) -> None:
        """Removes what an earlier drill wrote into the folder, and makes the data.

        Raises: ConfigError when the folder has files and was not made by a drill; nothing is removed then.
        """
        _clear(self.folder)
        self.data.mkdir()
        texts = [f"sentence {i} of words like {i * i} and {i % 7} others\n" for i in range(300)]
        tokenizer = self.data / "tokenizer.json"
        train_tokenizer(texts, vocab_size=_VOCAB_SIZE).backend.save(str(tokenizer))
        source = SourceText(train=texts, valid=texts[:20], licence="CC0-1.0", description="sentences with numbers")
        write_data_folder(self.data, {"sentences": source}, tokenizer, lambda amount: None)

    def newest_checkpoint(self, name: str) -> Path:
        checkpoints = self.run_folder(name) / "checkpoints"
        return step_folder(checkpoints, committed_steps(checkpoints)[-1])

    def shard(self) -> Path:
        return next(self.data.glob("sentences/train-*.bin"))


def _clear(folder: Path) -> None:
    marker = folder / MARKER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.is_file() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} has files, and no {MARKER}: no drill has made it, and a drill removes files.",
                "Give another --folder, or remove this one yourself.",
            )
        marker.touch()
        sync_folder(folder)
        for path in (folder / name for name in _OWN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made anew: {error.strerror}.", "Give another --folder.") from error


def flip_a_bit(file: Path, own: random.Random) -> int:
    """Flips one bit of the later half of a file, where a checkpoint has its numbers. Returns: which."""
    content = bytearray(file.read_bytes())
    bit = own.randrange(4 * len(content), 8 * len(content))
    content[bit >> 3] ^= 1 << (bit & 7)
    file.write_bytes(content)
    return bit
