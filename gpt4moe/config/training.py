"""Groups run, training, checkpoint, tracking, kernels."""

import re
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf

from gpt4moe.config import MISSING
from gpt4moe.config.step_sizes import BatchLevelConfig, LengthLevelConfig, StepSizes, validate_ramp
from gpt4moe.errors import ConfigError

NAME_CURE = "Use letters, digits and - _ . , = + @, 128 at most; begin with a letter, a digit or _."

REPORT_SECONDS = 20.0
"""How long a run that a signal ends may write its report. Slurm's grace period is needed for the checkpoint."""


@dataclass(kw_only=True, slots=True)
class RunSection:
    name: str = MISSING
    """The run folder is <run.root>/<run.name>."""
    root: str = "runs"
    seed: int = 1234
    """Decides the initial weights, the order of samples and the routers' noise."""

    def validate(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise self._refused()

    def require_plain_name(self) -> None:
        """For new runs alone: what is stored of older ones may have any name that `validate` takes.

        Raises: ConfigError.
        """
        # slurm/train.sh has the same rule: a name is a folder, and stands in commands.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@-]{0,127}", self.name):
            raise self._refused()

    def _refused(self) -> ConfigError:
        return ConfigError(
            f"run.name={ascii(self.name)[:150]} cannot name a folder.",
            NAME_CURE,
        )


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    steps: int = MISSING
    """Training stops after this step, counted from the beginning of the run. Nothing else depends on it."""
    global_batch_size: int = MISSING
    """Sequences in one step, over all ranks."""
    batch_ramp: list[BatchLevelConfig] = field(default_factory=list)
    """Smaller batches at the beginning, level after level; training.global_batch_size follows the last one."""
    length_ramp: list[LengthLevelConfig] = field(default_factory=list)
    """Shorter samples at the beginning, level after level; model.seq_length follows the last one."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of a rank."""
    eval_every: int = 0
    """Steps between evaluations on the validation text; 0: only at the end."""
    eval_samples: int = 64
    """Validation sequences of one evaluation; 0: no evaluation."""
    check_replicas_every: int = 100
    """Steps between checks that copies of one tensor on several ranks are bitwise equal; 0: never."""
    record_routing: int = 0
    """Steps between steps of which each rank writes down how many rows it sent to each expert (docs/imbalance.md); 0:
    never."""
    deterministic: bool = False
    """On GPUs, equal runs take the same kernels and sums, which are slower (docs/gpu.md). On CPUs they do anyway."""
    sample_every: int | None = None
    """Steps between texts that the model writes after each of `sample_prompts`; null: none."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts, in the tokenizer of the data. The model continues them greedily, with its most probable token."""
    sample_tokens: int = 64
    """New tokens of such a text at most; it also ends at an end token, and where the context does."""
    evaluate_tasks: list[str] = field(default_factory=list)
    """Evaluated at each step that gets a checkpoint: jsonl files of questions or texts, data folders, and names of
    tasks of lm-evaluation-harness."""
    evaluate_include_path: str | None = None
    """Folder with further tasks of lm-evaluation-harness."""
    evaluate_limit: int | None = None
    """Questions of each of `evaluate_tasks` at most, from its beginning; null: all. Texts are always whole."""

    def step_sizes(self, seq_length: int) -> StepSizes:
        """The size of every step, the samples and tokens of so many steps. seq_length: model.seq_length."""
        return StepSizes(self.batch_ramp, self.global_batch_size, seq_length, self.length_ramp)

    def after(self, steps: int) -> "TrainingConfig":
        """As a layout that begins after so many steps must fit it: a level of a ramp that is over is as the end."""
        done = self.step_sizes(1).samples(steps)
        levels = [
            one if one.until_samples > done else replace(one, global_batch_size=self.global_batch_size)
            for one in self.batch_ramp
        ]
        lengths = [one for one in self.length_ramp if one.until_step > steps]
        return replace(self, batch_ramp=levels, length_ramp=lengths)

    def of_one_size(self, global_batch_size: int) -> "TrainingConfig":
        """Without ramps."""
        return replace(self, global_batch_size=global_batch_size, batch_ramp=[], length_ramp=[])

    def validate(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)} is below 1.", f"Set training.{name}.")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"training.global_batch_size={self.global_batch_size} is no multiple of "
                f"training.micro_batch_size={self.micro_batch_size}.",
                f"Set training.micro_batch_size to {self._nearest_micro_batch()}, which divides it.",
            )
        first = self.length_ramp[0].global_batch_size if self.length_ramp else None
        key = "training.global_batch_size" if first is None else "training.length_ramp[0].global_batch_size"
        validate_ramp(self.batch_ramp, (key, first or self.global_batch_size), self.micro_batch_size)
        for name in ("eval_every", "eval_samples", "check_replicas_every", "record_routing"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}={getattr(self, name)} is negative.", "Set 0 or more.")
        self._validate_probes()

    def _validate_probes(self) -> None:
        if self.sample_every is not None and self.sample_every < 1:
            raise ConfigError(
                f"training.sample_every={self.sample_every} is below 1.", "Set steps, or null for no samples."
            )
        if self.sample_every is not None and not self.sample_prompts:
            raise ConfigError(
                f"training.sample_every={self.sample_every}, but there are no prompts.",
                "Set training.sample_prompts=['The '], or training.sample_every=null.",
            )
        if self.sample_tokens < 1:
            raise ConfigError(f"training.sample_tokens={self.sample_tokens} is below 1.", "Set 1 or more.")
        if self.evaluate_limit is not None and self.evaluate_limit < 1:
            raise ConfigError(
                f"training.evaluate_limit={self.evaluate_limit} is below 1.",
                "Set 1 or more, or null for all questions.",
            )
        for name in ("sample_prompts", "evaluate_tasks"):
            _refuse_doubles(name, getattr(self, name))

    def _nearest_micro_batch(self) -> int:
        return next(size for size in range(self.micro_batch_size, 0, -1) if self.global_batch_size % size == 0)


def _refuse_doubles(name: str, values: list[str]) -> None:
    double = next((value for value in values if values.count(value) > 1), None)
    if double is not None:
        raise ConfigError(f"training.{name} has {double!r} {values.count(double)} times.", "Name it once.")


class OnSaveFailure(str, Enum):
    """stop: the run ends, with status 2, or 86 where the disk stands still. go_on: it trains on, and saves when the
    next save is due."""

    stop = "stop"
    go_on = "go_on"


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: only at the end. A checkpoint at the end is always written."""
    keep: int = 3
    """This many of the newest checkpoints are kept; older ones are deleted. 0: all are kept."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are never deleted; 0: none."""
    asynchronous: bool = True
    """Write in the background, from a copy in host memory (12 bytes for each parameter of the rank). false: training
    waits until the checkpoint is written."""
    on_save_failure: OnSaveFailure = OnSaveFailure.stop
    """What is done where the disk refuses a save, or stands still. Where the last save of a run fails, the run ends as
    with stop."""
    max_failed_saves: int = 3
    """With go_on: saves in a row that may fail. The next one that fails ends the run as with stop."""
    stall_seconds: float = 900.0
    """A save in which the disk does not answer for so long has failed; 0: it is waited for."""
    load: str | None = None
    """Step folder or run folder whose weights a new run begins with."""
    load_only: list[str] = field(default_factory=list)
    """Patterns, as of a shell, of the tensors to read from `load` (decoder.layers.*, *.experts.*). Other tensors keep
    their initial values. Empty: all tensors are read, and a tensor that the model lacks is an error."""

    def validate(self) -> None:
        if min(self.every, self.keep, self.keep_every) < 0:
            raise ConfigError("checkpoint.every, keep and keep_every cannot be negative.", "Set 0 or more.")
        if self.max_failed_saves < 1:
            raise ConfigError(
                f"checkpoint.max_failed_saves={self.max_failed_saves} is below 1.",
                "Set 1 or more; to end at the first, set checkpoint.on_save_failure=stop.",
            )
        if not 0 <= self.stall_seconds < inf:
            raise ConfigError(
                f"checkpoint.stall_seconds={self.stall_seconds:g} is no time to wait.",
                "Set seconds; 900 is usual. 0 waits for ever.",
            )
        if self.load_only and self.load is None:
            raise ConfigError(
                f"checkpoint.load_only={self.load_only}, but checkpoint.load is not set.",
                "Set checkpoint.load to a step folder or a run folder, or checkpoint.load_only=[].",
            )


class WandbMode(str, Enum):
    """offline: wandb writes files in the run folder. online: it also uploads them. disabled: no wandb."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    wandb: WandbMode = WandbMode.offline
    project: str = "gpt4moe"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    dashboard: str | None = None
    """YAML file of the report's panels and of alerts; null: configs/dashboard.yaml."""
    count_bytes: bool = True
    """In the first step of each launch, count the bytes sent between ranks, for the report. That step is slower."""
