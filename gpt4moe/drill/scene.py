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

EVERY = 4
"""Steps between two saves."""
_VOCAB_SIZE = 264
_SMALL = (
    "+experiment=tiny", "model.num_layers=2", "model.hidden_size=32", "model.seq_length=32",
    f"model.vocab_size={_VOCAB_SIZE}", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=32",
    "training.global_batch_size=4", "training.micro_batch_size=1", "training.eval_every=5", "training.eval_samples=4",
    "training.check_replicas_every=10", "optimizer.lr=0.002", "schedule.warmup_steps=2", "schedule.total_steps=1000",
    "tracking.wandb=disabled", "resilience.hang_seconds=8", f"checkpoint.every={EVERY}", "checkpoint.keep=3",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Args: folder: everything of the drill. ranks: dp = ep = ranks."""

    folder: Path
    ranks: int
    steps: int
    more: Sequence[str] = ()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def run_folder(self, name: str) -> Path:
        return self.folder / name

    def overrides(self, name: str) -> list[str]:
        """The same for every launch of the run `name`."""
        own = (f"run.root={self.folder}", f"run.name={name}", f"data.path={self.data}", f"training.steps={self.steps}")
        return [*_SMALL, *own, f"parallel.ep={self.ranks}", *self.more]

    def build(self) -> None:
        """An empty folder, and the data."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.data.mkdir(parents=True)
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


def flip_a_bit(file: Path, own: random.Random) -> int:
    """Flips one bit of the later half of a file, where a checkpoint has its numbers. Returns: which."""
    content = bytearray(file.read_bytes())
    bit = own.randrange(4 * len(content), 8 * len(content))
    content[bit >> 3] ^= 1 << (bit & 7)
    file.write_bytes(content)
    return bit
