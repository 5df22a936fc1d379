"""The published runs of planner_error.yaml as rows that can be predicted.

planner_error.yaml, configs/cluster -> Row (model, cluster, layout, batch, published seconds)
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.beyond import Dispatch, Module, Products
from gpt4moe.config.cluster import ClusterConfig, Generation
from gpt4moe.config.model import MlaConfig, ModelConfig, PlannedConfig
from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.training import TrainingConfig
from gpt4moe.planner.work import TimedKind, timed_kinds

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published run."""

    source: str
    stack: str
    model: ModelConfig
    kinds: tuple[TimedKind, ...]
    cluster: ClusterConfig
    devices: int
    products: Products | None
    """Of matrix products; None: bf16."""
    parallel: ParallelConfig
    training: TrainingConfig
    note: str
    modules: frozenset[Module]
    """That the stack's recipe computes again (recipes)."""
    seconds: float
    """Seconds of a step: published, or computed from published numbers."""

    @property
    def profile(self) -> str:
        return f"{self.stack}/{self.cluster.generation.value}"

    @property
    def precision(self) -> str:
        """bf16 or fp8, whose scales make no difference to time."""
        return "bf16" if self.products is None else "fp8"

    @property
    def dispatch(self) -> Dispatch | None:
        """Its dispatcher where the note says that it is not its stack's."""
        dispatcher, _, overlapped = self.note.partition("_")
        named = {"alltoall": Dispatch.plain, "deepep": Dispatch.tuned}
        return Dispatch.overlapped if overlapped == "overlapped" else named.get(dispatcher)

    @property
    def name(self) -> str:
        cut = self.parallel
        degrees = {"tp": cut.tp, "pp": cut.pp, "vpp": cut.vpp, "cp": cut.cp, "ep": cut.ep, "etp": cut.etp}
        layout = " ".join(f"{axis}{size}" for axis, size in degrees.items() if size > 1) or "one rank"
        batch = f"batch {self.training.global_batch_size} x {self.model.seq_length}"
        note = "" if self.note == "none" else f", {self.note}"
        return f"{self.model.name} {self.devices} x {self.cluster.name} {self.precision} {layout}, {batch}{note}"


@cache
def published() -> dict[str, Any]:
    """planner_error.yaml."""
    found: dict[str, Any] = yaml.safe_load((HERE / "planner_error.yaml").read_text())
    return found


def recipe(source: str, model: str) -> dict[str, Any]:
    """What a source's recipe of a model computes again and keeps in 16 bits; empty: nothing that is known."""
    found: dict[str, Any] = published()["recipes"].get(f"{source} {model}", {})
    return found


@cache
def rows() -> list[Row]:
    """All rows of planner_error.yaml, in its order."""
    raw = published()
    models = {name: _model(name, fields) for name, fields in raw["models"].items()}
    stacks = {source: about["profile"] for source, about in raw["sources"].items()}
    return [
        _row(source, stacks[source], models, raw["clusters"], values)
        for source, listed in raw["rows"].items()
        for values in listed
    ]


def _model(name: str, fields: dict[str, Any]) -> ModelConfig:
    fields = dict(fields)
    moe, mla, planned = (fields.pop(part, None) for part in ("moe", "mla", "planned"))
    dense = fields.pop("dense_layers", 0)
    if moe and dense:
        moe = {**moe, "layer_pattern": [0] * dense + [1] * (fields["num_layers"] - dense)}
    return ModelConfig(
        name=name, seq_length=1, moe=MoEConfig(**moe) if moe else None, mla=MlaConfig(**mla) if mla else None,
        planned=PlannedConfig(**planned) if planned else None, **fields,
    )  # fmt: skip


@cache
def _cluster(name: str) -> ClusterConfig:
    raw = yaml.safe_load((HERE.parent / "configs" / "cluster" / f"{name}.yaml").read_text())
    # PyYAML reads 312.0e12 as a string, OmegaConf as the number it is.
    numbers = {key: float(value) if isinstance(value, str) and key not in ("name", "generation") else value
               for key, value in raw.items()}  # fmt: skip
    return ClusterConfig(**{**numbers, "generation": Generation(raw["generation"])})


def _row(source: str, stack: str, models: dict[str, ModelConfig], clusters: dict[str, Any], values: list[Any]) -> Row:
    name, machine, devices, precision, tp, pp, vpp, cp, ep, etp, micro, batch, seq_length, note, kind, value = values
    model = replace(models[name], seq_length=seq_length)
    special = dict(clusters.get(machine, {}))
    cluster = _cluster(special.pop("base", machine))
    if special:
        special["generation"] = Generation(special["generation"])
        cluster = replace(cluster, name=machine, **special)
    recompute = Recompute(note) if note in ("selective", "full") else Recompute.none
    parallel = ParallelConfig(
        tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, recompute=recompute,
        sequence_parallel=False if source == "korthikanti" and note == "full" else None,
    )  # fmt: skip
    tokens = batch * seq_length
    if kind == "tokens_per_second_per_gpu":
        value = tokens / (value * devices)
    elif kind == "mfu":
        flops = flops_per_token(model)
        value = (flops.model + flops.attention) * tokens / (devices * value / 100 * cluster.peak_flops_bf16)
    training = TrainingConfig(steps=1, global_batch_size=batch, micro_batch_size=micro)
    again = recipe(source, name).get("recompute", {})
    return Row(
        source=source, stack=stack, model=model, kinds=tuple(timed_kinds(model)), cluster=cluster, devices=devices,
        products=None if precision == "bf16" else Products(precision), parallel=parallel, training=training, note=note,
        seconds=value,
        modules=frozenset(map(Module, again.get(f"{machine} tp{tp}", again.get(machine, [])))),
    )  # fmt: skip
