"""Predicted against published step times: the planner's error, row by row, with its misses.

    python -m benchmarks.planner_error           the table, with the constants of planner/efficiency.py
    python -m benchmarks.planner_error fit       the constants found anew (a minute)
    python -m benchmarks.planner_error left-out  every row predicted by constants fitted without it (minutes; or of the
                                                 stacks named after it); writes
                                                 benchmarks/planner_error_left_out.json, which the table shows

Rows, sources and assumptions are in planner_error.yaml. A stack's constants are shared by all its rows; only the share
of the peak that large products reach differs between hardware generations. No constant belongs to a row.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from gpt4moe.config.cluster import ClusterConfig, Generation
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.planned import MlaConfig, PlannedConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.planner.efficiency import PROFILES, Efficiency
from gpt4moe.planner.flops import flops_per_token
from gpt4moe.planner.layer_time import LayerKind, Work, layer_kinds
from gpt4moe.planner.step_time import step_time

HERE = Path(__file__).parent
LEFT_OUT = HERE / "planner_error_left_out.json"
FITTED = {
    "megatron-lm-2022": ["matrix", "exposed"],
    "llama3-2024": ["matrix"],
    "megatron-core-2025": ["matrix", "exposed", "copy_passes", "moe_layer_seconds"],
    "megatron-bridge-26.04": ["matrix", "exposed", "copy_passes", "moe_layer_seconds"],
}
"""Stack -> the constants that its rows decide."""
HELD_OUT = {"modelzoo"}
"""Sources that no constant was fitted to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published run."""

    source: str
    stack: str
    model: ModelConfig
    kinds: tuple[LayerKind, ...]
    cluster: ClusterConfig
    devices: int
    precision: str
    parallel: ParallelConfig
    training: TrainingConfig
    note: str
    seconds: float
    """Of a step, published or worked out from what was."""

    @property
    def profile(self) -> str:
        return f"{self.stack}/{self.cluster.generation.value}"

    @property
    def name(self) -> str:
        cut = self.parallel
        degrees = {"tp": cut.tp, "pp": cut.pp, "vpp": cut.vpp, "cp": cut.cp, "ep": cut.ep, "etp": cut.etp}
        layout = " ".join(f"{axis}{size}" for axis, size in degrees.items() if size > 1) or "one rank"
        batch = f"batch {self.training.global_batch_size} x {self.model.seq_length}"
        note = "" if self.note == "none" else f", {self.note}"
        return f"{self.model.name} {self.devices} x {self.cluster.name} {self.precision} {layout}, {batch}{note}"


@cache
def rows() -> list[Row]:
    """All rows of planner_error.yaml, in its order."""
    raw = yaml.safe_load((HERE / "planner_error.yaml").read_text())
    models = {name: _model(name, fields) for name, fields in raw["models"].items()}
    stacks = {source: about["profile"] for source, about in raw["sources"].items()}
    return [
        _row(source, stacks[source], models, raw["clusters"], values)
        for source, listed in raw["rows"].items()
        for values in listed
    ]


def predict(row: Row, efficiency: Efficiency) -> float:
    """Seconds of the row's step."""
    peak = row.cluster.peak_flops_bf16 if row.precision == "bf16" else row.cluster.peak_flops_fp8
    assert peak is not None
    efficiency = _dispatched(efficiency, row.note)
    work = Work(
        model=row.model, kinds=list(row.kinds), parallel=row.parallel,
        micro_batch_size=row.training.micro_batch_size, cluster=row.cluster, efficiency=efficiency, matrix_peak=peak,
    )  # fmt: skip
    return step_time(work, row.training, row.devices, balanced=True).seconds


def _dispatched(efficiency: Efficiency, note: str) -> Efficiency:
    """A row whose dispatcher is not its stack's, as the source says."""
    if note == "deepep":
        return replace(efficiency, one_copy_per_domain=True)
    if not note.startswith("alltoall"):
        return efficiency
    plain = PROFILES["megatron-core-2025/hopper"]  # fitted to other rows
    exposed = efficiency.exposed if note == "alltoall_overlapped" else plain.exposed
    return replace(efficiency, copy_passes=plain.copy_passes, exposed=exposed, one_copy_per_domain=False)


def errors(of: list[Row], profiles: dict[str, Efficiency]) -> list[float]:
    """Predicted over published, less 1."""
    return [predict(row, profiles[row.profile]) / row.seconds - 1 for row in of]


def fit(stack: str, of: list[Row], *, step: float = 1.3) -> dict[str, Efficiency]:
    """The stack's constants that make the mean and the root mean square of the log errors smallest, by coordinates."""
    profiles = {name: profile for name, profile in PROFILES.items() if name.split("/")[0] == stack}
    knobs = [(name, "matrix") for name in profiles] + [("", field) for field in FITTED[stack] if field != "matrix"]
    steps, best = dict.fromkeys(knobs, step), _loss(of, profiles)
    while max(steps.values()) > 1.01:
        has_moved = False
        for knob in knobs:
            for factor in (steps[knob], 1 / steps[knob]):
                tried = _turned(profiles, knob, factor)
                loss = _loss(of, tried)
                if loss < best - 1e-7:
                    profiles, best, has_moved = tried, loss, True
        if not has_moved:
            steps = {knob: 1 + (size - 1) / 2 for knob, size in steps.items()}
    return profiles


def _turned(profiles: dict[str, Efficiency], knob: tuple[str, str], factor: float) -> dict[str, Efficiency]:
    """One constant multiplied: of one profile (matrix), or of the whole stack."""
    only, field = knob

    def turn(profile: Efficiency) -> Efficiency:
        value = getattr(profile, field) * factor
        return replace(profile, **{field: min(1.0, value) if field in ("matrix", "exposed") else value})

    return {name: turn(profile) if only in ("", name) else profile for name, profile in profiles.items()}


def _loss(of: list[Row], profiles: dict[str, Efficiency]) -> float:
    logs = [abs(log(predict(row, profiles[row.profile]) / row.seconds)) for row in of]
    return sum(logs) / len(logs) + 0.5 * (sum(value**2 for value in logs) / len(logs)) ** 0.5


def fitted_rows(stack: str) -> list[Row]:
    return [row for row in rows() if row.stack == stack and row.source not in HELD_OUT]


def left_out(stack: str) -> dict[str, float]:
    """Each row's error under constants fitted to the other rows of its stack."""
    mine = fitted_rows(stack)
    return {
        row.name: errors([row], fit(stack, [other for other in mine if other is not row], step=1.05))[0] for row in mine
    }


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    ranks = [_ranks(first), _ranks(second)]
    mean = (len(first) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
    spread = [sum((rank - mean) ** 2 for rank in one) for one in ranks]
    return covariance / (spread[0] * spread[1]) ** 0.5


def _ranks(values: list[float]) -> list[float]:
    return [(sum(o < v for o in values) + sum(o <= v for o in values) + 1) / 2 for v in values]


def comparable() -> dict[str, list[Row]]:
    """Rows that differ in their layout alone: same source, model, devices and batch; three or more."""
    groups: dict[str, list[Row]] = {}
    for row in rows():
        key = f"{row.source}: {row.model.name}, {row.devices} devices, batch {row.training.global_batch_size}"
        groups.setdefault(f"{key} x {row.model.seq_length}, {row.cluster.name}", []).append(row)
    return {key: group for key, group in groups.items() if len(group) > 2}


def table() -> str:
    """Markdown: every row, then the summary."""
    kept = json.loads(LEFT_OUT.read_text()) if LEFT_OUT.exists() else {}
    lines = ["| source | run | published s | predicted s | error | left out |", "|---|---|---|---|---|---|"]
    for row, error in zip(rows(), errors(rows(), PROFILES), strict=True):
        without = f"{kept[row.name]:+.1%}" if row.name in kept else "never fitted" if kept else "not run"
        predicted = row.seconds * (1 + error)
        lines.append(f"| {row.source} | {row.name} | {row.seconds:.3g} | {predicted:.3g} | {error:+.1%} | {without} |")
    return "\n".join([*lines, "", *(_summary(kept) if kept else [f"`left-out` was not run: {_fitted_errors()}"])])


def _fitted_errors() -> str:
    found = [abs(error) for error in errors([row for stack in FITTED for row in fitted_rows(stack)], PROFILES)]
    return f"{len(found)} rows with the constants fitted to them, median {median(found):.1%}, worst {max(found):.1%}."


def _summary(kept: dict[str, float]) -> list[str]:
    lines = ["| stack | rows | constants | median error | left out | worst, left out |", "|---|---|---|---|---|---|"]
    whole: list[float] = []
    for stack in FITTED:
        mine = fitted_rows(stack)
        now, without = [abs(e) for e in errors(mine, PROFILES)], [abs(kept[row.name]) for row in mine]
        constants = len(FITTED[stack]) - 1 + len({row.profile for row in mine})
        whole += without
        lines.append(
            f"| {stack} | {len(mine)} | {constants} | {median(now):.1%} | {median(without):.1%} | {max(without):.1%} |"
        )
    unseen = [abs(e) for e in errors([row for row in rows() if row.source in HELD_OUT], PROFILES)]
    lines.append(f"| never fitted | {len(unseen)} | 0 | {median(unseen):.1%} | | {max(unseen):.1%} |")
    beyond = sum(error > 0.25 for error in whole)
    lines += ["", f"All {len(whole)} fitted rows, each left out: median {median(whole):.1%}, worst {max(whole):.1%}, "
              f"{beyond} beyond 25%."]  # fmt: skip
    ranked = [spearman([row.seconds for row in g], [predict(row, PROFILES[row.profile]) for row in g])
              for g in comparable().values()]  # fmt: skip
    good = sum(value >= 0.8 for value in ranked)
    lines.append(
        f"Ranking of layouts: {len(ranked)} groups of three or more that differ in layout alone, Spearman mean "
        f"{sum(ranked) / len(ranked):.2f}, lowest {min(ranked):.2f}, {good} of {len(ranked)} at 0.8 or more."
    )
    return lines


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
    return Row(
        source=source, stack=stack, model=model, kinds=tuple(layer_kinds(model)), cluster=cluster, devices=devices,
        precision=precision, parallel=parallel, training=training, note=note, seconds=value,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    if arguments == ["fit"]:
        for stack in FITTED:
            for name, profile in fit(stack, fitted_rows(stack)).items():
                print(name, profile)
    elif arguments[:1] == ["left-out"]:
        found = {name: error for stack in arguments[1:] or FITTED for name, error in left_out(stack).items()}
        kept = json.loads(LEFT_OUT.read_text()) if LEFT_OUT.exists() and arguments[1:] else {}
        kept |= {name: round(error, 4) for name, error in found.items()}
        names = [row.name for row in rows() if row.name in kept]  # others are gone
        LEFT_OUT.write_text(json.dumps({name: kept[name] for name in names}, indent=1) + "\n")
        print(f"{len(found)} rows, median error {median(abs(error) for error in found.values()):.1%}")
    else:
        print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
