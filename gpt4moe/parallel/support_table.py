"""The table of docs/layouts.md: which settings can be combined. Each cell calls the checks themselves. No torch.

    SETTINGS, one or two of them -> configuration's own checks -> parallel.legality -> "yes" or the reason, as a note

Run: python -m gpt4moe.parallel.support_table
"""

from dataclasses import replace
from typing import Any

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig, RouterConfig
from gpt4moe.config.optimizer import EngineConfig, EngineKind
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.legality import layout_problems, support_problems

Setting = dict[str, dict[str, Any]]
"""Group (parallel, model, router, engine) -> its fields and values."""

WORLD_SIZE = 16
DEGREES: dict[str, Setting] = {
    "tp=2": {"parallel": {"tp": 2}},
    "pp=2": {"parallel": {"pp": 2}},
    "pp=2 vpp=2": {"parallel": {"pp": 2, "vpp": 2}},
    "cp=2": {"parallel": {"cp": 2}},
    "ep=2": {"parallel": {"ep": 2}},
    "etp=2": {"parallel": {"etp": 2}},
}
PARTIAL: dict[str, Setting] = {
    "recompute=full recompute_layers=1": {"parallel": {"recompute": Recompute.full, "recompute_layers": 1}}
}
DEEPSPEED: dict[str, Setting] = {"engine=deepspeed": {"engine": {"kind": EngineKind.deepspeed}}}
SETTINGS: dict[str, Setting] = {
    **DEGREES,
    "sequence_parallel=false": {"parallel": {"sequence_parallel": False}},
    "head_counts_as_layer=true": {"parallel": {"head_counts_as_layer": True}},
    "recompute=selective": {"parallel": {"recompute": Recompute.selective}},
    "recompute=moe": {"parallel": {"recompute": Recompute.moe}},
    "recompute=full": {"parallel": {"recompute": Recompute.full}},
    **PARTIAL,
    "model.moe=null": {"model": {"moe": None}},
    "model.moe.router.input_jitter=0.01": {"router": {"input_jitter": 0.01}},
    **DEEPSPEED,
    "engine.overlap_grad_reduce=true": {"engine": {"overlap_grad_reduce": True}},
    "engine.offload_optimizer=true": {"engine": {"offload_optimizer": True}},
}
_SMALL = ModelConfig(
    name="small", num_layers=8, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=64, ffn_hidden_size=32
)
SUPPORT_COLUMNS: dict[str, Setting] = {"alone": {}, **DEGREES, **PARTIAL, **DEEPSPEED}


def refusal(*settings: Setting) -> str | None:
    """Why a small model with all of these settings is refused on WORLD_SIZE ranks; None: it is accepted.

    Under engine=deepspeed overlap_grad_reduce is off unless a setting says otherwise, as configs/engine has it.
    """
    groups: Setting = {"parallel": {}, "model": {}, "router": {}, "engine": {}}
    for setting in settings:
        for group, fields in setting.items():
            groups[group] |= fields
    if groups["engine"].get("kind") is EngineKind.deepspeed:
        groups["engine"].setdefault("overlap_grad_reduce", False)
    moe = MoEConfig(num_experts=4, ffn_hidden_size=32, router=RouterConfig(**groups["router"]))
    changes: dict[str, Any] = {"moe": moe} | groups["model"]
    model = replace(_SMALL, **changes)
    parallel, training = ParallelConfig(**groups["parallel"]), TrainingConfig(steps=1, global_batch_size=64)
    try:
        for config in (model, parallel, training, EngineConfig(**groups["engine"])):
            config.validate()
    except ConfigError as error:
        return error.cause
    problems = layout_problems(model, parallel, training, WORLD_SIZE) or support_problems(model, parallel)
    return problems[0].cause if problems else None


def support_table() -> str:
    """The table and its notes, in Markdown."""
    notes: list[str] = []
    rows = [["", *SUPPORT_COLUMNS], ["---"] * (len(SUPPORT_COLUMNS) + 1)]
    for name, setting in SETTINGS.items():
        rows.append([name, *(_cell(setting, column, notes) for column in SUPPORT_COLUMNS.values())])
    lines = ["| " + " | ".join(f"`{cell}`" if "=" in cell else cell for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1)), ""])


def _cell(row: Setting, column: Setting, notes: list[str]) -> str:
    keys = [(group, key, value) for group, fields in column.items() for key, value in fields.items()]
    if any(row.get(group, {}).get(key, value) != value for group, key, value in keys):
        return ""  # both set one key, differently
    reason = refusal(row, column)
    if reason is None:
        return "yes"
    if reason not in notes:
        notes.append(reason)
    return f"no ({notes.index(reason) + 1})"


if __name__ == "__main__":
    print(support_table(), end="")
