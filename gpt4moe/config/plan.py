"""The configuration of tools/plan.py: that of a run, and the planner's own keys at the top level."""

import re
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from pathlib import Path

from gpt4moe.config.beyond import BeyondConfig
from gpt4moe.config.data import DataKind
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError


class PlanOutput(str, Enum):
    """The form of the answer."""

    table = "table"
    json = "json"
    html = "html"


class PlanReport(str, Enum):
    """Reports about published models. They need no run of the user."""

    leak = "leak"
    inference = "inference"


class ServedPrecision(str, Enum):
    """What weights are stored and multiplied in. The cache and activations stay bf16."""

    bf16 = "bf16"
    fp8 = "fp8"


class InferenceObjective(str, Enum):
    """What the best layouts of inference are chosen by: the smallest of this."""

    output_usd = "output_usd"
    """USD for a million new tokens."""
    request_usd = "request_usd"
    """USD for one request: its prompt and its new tokens."""
    first_token = "first_token"
    """Seconds to the first token of a prompt that comes alone."""


@dataclass(kw_only=True, slots=True)
class InferencePlanConfig:
    """The keys inference.*: a deployment, as `plan.py serve` (report=inference) plans it."""

    tp: int = 8
    """Devices that share a stage, and with it its experts. With pp: the deployment reported of GPT-4."""
    pp: int = 16
    """Stages; they may be uneven."""
    ep: int | None = None
    """Ranks of a stage that divide the experts: tp, or tp times the copies of the model that share; null: tp."""
    prompt_tokens: int = 2048
    """Tokens of a request's prompt; an assumption."""
    new_tokens: int = 512
    """Tokens that a request generates; an assumption."""
    chunk_tokens: int = 1024
    """Prompt tokens that pass a stage at once."""
    sequences: int | None = None
    """Sequences in flight on all devices; null: the most that fit and keep max_token_ms."""
    max_token_ms: float = 100.0
    """Longest time from a token to the next. An assumption: 10 tokens a second, faster than people read."""
    precision: ServedPrecision = ServedPrecision.bf16
    objective: InferenceObjective = InferenceObjective.output_usd

    def validate(self) -> None:
        for name in ("tp", "pp", "ep", "prompt_tokens", "new_tokens", "chunk_tokens", "sequences", "max_token_ms"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < inf:
                raise ConfigError(
                    f"inference.{name}={value:g} is below 1, or no number.", f"Set inference.{name} to 1 or more."
                )


DEFAULT_STEPS = 1000
"""Steps of a plan that says neither steps nor tokens (configs/plan.yaml); every plan with as many remarks on it."""
MOST_GPUS = 10_000_000
"""Of a plan: the layouts of many more are not listed in minutes."""
MOST_TOKENS = 1e20
"""Of a plan's tokens and epochs."""
DEFAULT_IMBALANCE = 1.5
"""The fullest expert had 1.52 (3B) and 1.72 (1B) times the mean with a balancing loss (arXiv:2408.15664, table 2)."""
TOKENS_OF_AN_IMAGE = 1024
"""Tokens of a sequence for each image that it has, where images_per_sequence is null. An assumption, for documents with
images beside as much plain text; those of OBELICS alone (arXiv:2306.16527) have an image for every 326 tokens."""
ALONE = {
    "report": {"report", "output"},
    "calibrate": {
        "calibrate", "output", "imbalance", "images_per_sequence", "detect_seconds", "restart_minutes", "time_factor",
    },
}  # fmt: skip
"""Options that do not plan the run of the command line -> the keys that have an effect together with them."""
SERVED = ("report", "output", "file", "gpus", "imbalance", "inference", "model", "router", "cluster", "experiment")
"""What report=inference reads: keys, groups and their keys."""
SEARCHED = ("parallel", "training.micro_batch_size")
"""A search tries the values of these keys itself."""
SEARCH_ONLY = ("budget_usd", "days", "top")


@dataclass(kw_only=True, slots=True)
class PlanConfig(RunConfig):
    gpus: int | None = None
    """Devices; null: cluster.devices, or else the fewest that the layout allows. report=inference: the fewest."""
    output: PlanOutput = PlanOutput.table
    file: str = "plan.html"
    """The file that output=html writes."""
    search: bool = False
    """Compare all legal layouts that fit the memory, instead of planning one. With budget_usd and days but without
    gpus, the number of devices is what the money can rent for that time."""
    top: int = 10
    """Layouts that a search shows."""
    tokens: float | None = None
    """Training tokens of the run, instead of training.steps: the fewest steps that train so many."""
    epochs: float | None = None
    """Passes over the data, instead of training.steps: of data.path, or of sources that say their tokens."""
    budget_usd: float | None = None
    """Money to spend. With search=true the answer has the number of tokens that it pays for."""
    days: float | None = None
    """Time for the training that budget_usd pays."""
    report: PlanReport | None = None
    """leak: the numbers reported about GPT-4, claim by claim. inference: latency, throughput and price of a deployment
    and of the three best layouts of its devices."""
    inference: InferencePlanConfig = field(default_factory=InferencePlanConfig)
    calibrate: str | None = None
    """A run folder: compares the plan of that run with its measurements."""
    stack: str | None = None
    """A published stack whose constants, kernels, gradients the plan takes (planner.stacks); null: of the trainer."""
    beyond: BeyondConfig = field(default_factory=BeyondConfig)
    imbalance: float = DEFAULT_IMBALANCE
    """Tokens at the experts of the fullest rank, divided by an even share."""
    images_per_sequence: float | None = None
    """Still images of a sequence, of a vision model; null: one for TOKENS_OF_AN_IMAGE tokens, 1 to data.max_images."""
    detect_seconds: float = 0.0
    """Seconds from a fault until its job has ended, in addition to restart_minutes. make drill measures both."""
    restart_minutes: float = 10.0
    """Minutes from an unexpected stop to the first step after it; an assumption."""
    save_share: float = 0.01
    """Share of the time that saving may cost: a plan says at which write rate it does not cost more."""
    pue: float = 1.1
    """Power of the whole hall over that of the devices and servers in it."""
    grid_kg_co2e_per_kwh: float = 0.436
    """Emissions of the electricity."""
    time_factor: float = 1.0
    """Multiplies the time of every part of a step, but not saving, restarts or memory. calibrate= measures it."""
    has_steps: bool = field(default=False, metadata={"omegaconf_ignore": True})
    """Whether the command line says training.steps; no key."""
    distinct_tokens: float | None = field(default=None, metadata={"omegaconf_ignore": True})
    """Training tokens of the data on disk (data.overview), each counted once; None: not known; no key."""
    data_refusals: list[str] = field(default_factory=list, metadata={"omegaconf_ignore": True})
    """Why a run of this plan is refused for its data (data.overview); no key."""

    @property
    def reads_data(self) -> bool:
        """Whether data.path says something of this plan: how long it is (epochs), or how much text is on disk."""
        return self.epochs is not None or (self.report is None and self.data.kind is not DataKind.mock)

    def validate(self) -> None:
        RunConfig.validate(self)
        self.inference.validate()
        self._validate_beyond()
        for name in ("gpus", "top", "tokens", "epochs", "budget_usd", "days", "time_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{name}={value} is no number above 0.", f"Set {name} above 0, or leave it out.")
        for key, devices in {"gpus": self.gpus, "cluster.devices": self.cluster.devices}.items():
            if (devices or 0) > MOST_GPUS:
                raise ConfigError(f"{key}={devices} is more than any cluster has.", f"Set {key}={MOST_GPUS} at most.")
        images = self.images_per_sequence
        if images is not None and not 0 < images <= self.data.max_images:
            raise ConfigError(
                f"images_per_sequence={images:g} is not above 0 and at most data.max_images={self.data.max_images}.",
                "Set images_per_sequence=8, say, or a larger data.max_images.",
            )
        if not self.file or Path(self.file).is_dir():
            raise ConfigError(f"file={self.file} is no file to write.", "Set file=plan.html, or another name.")
        has_page = self.report is PlanReport.inference
        asked = next(
            (name for name in ("report", "calibrate") if getattr(self, name) is not None and not has_page), None
        )
        if asked and self.output is PlanOutput.html:
            raise ConfigError(
                f"{asked}=... with output=html: its answer is a text or data, no page.",
                "Leave output out, or set output=json.",
            )
        if not 0 < self.save_share < 1:
            raise ConfigError(
                f"save_share={self.save_share:g} is no share of the time above 0.", "Set save_share=0.01, say."
            )
        if not (1 <= self.pue < inf and 0 <= self.grid_kg_co2e_per_kwh < inf):
            raise ConfigError(
                f"pue={self.pue:g} or grid_kg_co2e_per_kwh={self.grid_kg_co2e_per_kwh:g} is out of range: a PUE is 1 "
                "or more, emissions 0 or more.",
                "Set pue=1.1 and grid_kg_co2e_per_kwh=0.436, say.",
            )
        if not 0 <= self.detect_seconds < inf:
            raise ConfigError(
                f"detect_seconds={self.detect_seconds:g} is no number of seconds.", "Set detect_seconds=30."
            )
        most = max(self.model.moe.num_experts, DEFAULT_IMBALANCE) if self.model.moe else inf  # one expert: no effect
        if not (1 <= self.imbalance < inf and 0 <= self.restart_minutes < inf) or self.imbalance > most:
            raise ConfigError(
                f"imbalance={self.imbalance:g} or restart_minutes={self.restart_minutes:g} is out of range: imbalance "
                f"is 1 to the experts of a layer ({most:g}), restart_minutes 0 or more.",
                f"Set imbalance={DEFAULT_IMBALANCE:g} and restart_minutes=10, say.",
            )

    def _validate_beyond(self) -> None:
        fp32 = [key for key in self.beyond.asked() if self.precision.dtype is Dtype.fp32]
        if fp32:
            raise ConfigError(
                f"{fp32[0]} with precision.dtype=fp32, beside which it is nothing.", "Set precision=bf16."
            )
        cut = self.parallel
        if self.beyond.recompute and cut.recompute is Recompute.full and cut.recompute_layers is None:
            raise ConfigError(
                "beyond.recompute has no effect with parallel.recompute=full, which repeats whole layers.",
                "Leave one of them out.",
            )
        self.beyond.require_used(self.model, None if self.search or self.report else cut)

    def take_tokens(self, given: list[str]) -> None:
        """Sets training.steps to what trains `tokens`, and has_steps. Args: given: keys of the command line.

        Raises: ConfigError if two keys say how long the run is.
        """
        self.has_steps = "training.steps" in given
        lengths = {"epochs": self.epochs, "tokens": self.tokens}
        said = [f"{key}={value:g}" for key, value in lengths.items() if value is not None]
        said += [f"training.steps={self.training.steps}"] * self.has_steps
        if len(said) > 1:
            raise ConfigError(f"{said[0]} and {said[1]} both say how long the run is.", "Leave one of them out.")
        self.train_tokens(self.tokens)

    def train_tokens(self, tokens: float | None) -> None:
        """Sets training.steps to the fewest that train so many tokens; None: leaves them as they are."""
        self.tokens = tokens
        if self.tokens is None:
            return
        if not self.tokens <= MOST_TOKENS:
            key = "tokens" if self.epochs is None else f"epochs={self.epochs:g}: tokens"
            raise ConfigError(
                f"{key}={self.tokens:g} is above {MOST_TOKENS:g}, more than was ever written.",
                f"Set {'tokens=13e12' if self.epochs is None else 'epochs=2'}, say.",
            )
        whole = self.step_sizes.steps(self.tokens)
        self.training.steps = whole + (self.step_sizes.tokens(whole) < self.tokens)

    def require_used(self, given: list[str]) -> None:
        """Refuses options that would have no effect.

        Args: given: keys of the command line, without pluses and tildes.
        Raises: ConfigError with the first of them.
        """
        is_served = self.report is PlanReport.inference
        for key in given:
            group = re.split(r"[.@/]", key)[0]
            if is_served and group not in SERVED:
                self._refuse_idle(key, "serve", "serving has no such setting", "or plan a training run: without serve")
            if group == "inference" and not is_served:
                self._refuse_idle(key, "no serve", "a training run is planned", "or write plan.py serve")
        for asked, allowed in {} if is_served else ALONE.items():
            idle = [key for key in given if key not in allowed]
            if getattr(self, asked) is not None and idle:
                why = "it plans the runs of the report" if asked == "report" else "a run's own settings count"
                self._refuse_idle(idle[0], f"{asked}=...", why, f"or {asked}")
        for key in given:
            is_searched = key == SEARCHED[0] or key.startswith((f"{SEARCHED[0]}.", SEARCHED[1]))
            if self.search and is_searched:
                self._refuse_idle(key, "search=true", "a search tries all of them", "or search")
            if not self.search and key in SEARCH_ONLY:
                self._refuse_idle(key, "no search", "one layout is planned as it is", "or add search=true")
            if key == "images_per_sequence" and self.model.vision is None and self.calibrate is None:
                self._refuse_idle(key, "model.vision=null", "a text model reads no images", "or give model.vision")
            if key == "file" and self.output is not PlanOutput.html:
                self._refuse_idle(key, f"output={self.output.value}", "no page is written", "or add output=html")

    @staticmethod
    def _refuse_idle(key: str, beside: str, why: str, instead: str) -> None:
        raise ConfigError(f"{key} has no effect with {beside}: {why}.", f"Leave out {key}, {instead}.")


def beyond_of(run: RunConfig) -> BeyondConfig:
    """What a plan has beyond the trainer; nothing of a run."""
    return run.beyond if isinstance(run, PlanConfig) else BeyondConfig()


def images_per_sequence(run: RunConfig) -> float:
    """Still images of a sequence that a plan counts with; 0 of a text model."""
    if run.model.vision is None:
        return 0.0
    if isinstance(run, PlanConfig) and run.images_per_sequence is not None:
        return run.images_per_sequence
    return float(min(max(1, run.model.seq_length // TOKENS_OF_AN_IMAGE), run.data.max_images))
