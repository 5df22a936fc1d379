"""A plan as JSON data: the contract that other programs read."""

from dataclasses import asdict

from gpt4moe.config.plan import images_per_sequence
from gpt4moe.planner.estimate import Estimate
from gpt4moe.planner.memory import StageMemory
from gpt4moe.planner.stacks import stack_text
from gpt4moe.planner.upkeep import upkeep_json


def to_json(result: Estimate) -> dict[str, object]:
    """A plan as JSON data. Other programs read it, so its keys and units do not change."""
    layout, step, run = result.layout, result.step, result.run
    stalls = {"checkpoint": run.checkpoint_seconds, "failures": run.failure_seconds}
    images: dict[str, object] = {}
    if result.images is not None:
        images["images"] = {
            "per_sequence": images_per_sequence(result.plan),
            "encoder_parameters": result.encoder_parameters,
            "flops_per_sequence": asdict(result.images),
        }
    return images | {
        "parameters": {
            "total": result.parameters.total,
            "active": result.parameters.active,
            "per_component": result.parameters.per_component,
            "per_rank": [{"dense": rank.dense, "experts": rank.expert} for rank in result.rank_parameters],
        },
        "flops": {
            "per_token": result.flops.layers,
            "total": result.flops.layers * result.tokens,
            "total_with_attention": result.total_flops("model"),
        },
        "layout": {
            **{name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")},
            "world": layout.world_size,
        },
        "memory": {"per_stage": [_memory_json(stage) for stage in result.memory]},
        "time": {
            "step_seconds": step.seconds,
            "tokens_per_second": result.tokens_per_second,
            "tokens_per_second_per_gpu": result.tokens_per_second / layout.world_size,
            "mfu": result.mfu,
            "days": result.days,
            "parts": {**step.parts, **stalls},
        },
        "phases": [
            {
                **asdict(phase),
                "days": phase.seconds / 86400,
                "usd": result.phase_usd(phase),
            }
            for phase in result.phases
        ],
        "cost": {"usd": result.cost.usd, "gpu_hours": result.cost.gpu_hours, "kwh": result.cost.kwh},
        **upkeep_json(result.upkeep),
        "interval": _interval_json(result),
        "stack": {"name": result.plan.stack, "constants": stack_text(result.plan)},
        "unbuilt": result.unbuilt,
        "bottleneck": result.bottleneck,
        "warnings": result.warnings,
    }


def _interval_json(result: Estimate) -> dict[str, object] | None:
    """What the step, the days and the cost may turn out as: [least, most], or null."""
    if result.interval is None:
        return None
    return {
        **asdict(result.interval),
        "step_seconds": result.likely(result.step.seconds),
        "days": result.likely(result.days),
        "usd": result.likely(result.cost.usd),
    }


def _memory_json(stage: StageMemory) -> dict[str, int]:
    """Memory of a stage. The reserve is added to the buffers, so that the lines sum up to the total."""
    names = ("weights", "gradients", "optimizer", "activations")
    lines = {f"{name}_bytes": int(getattr(stage, f"{name}_bytes")) for name in names}
    if stage.images_bytes:
        lines["images_bytes"] = stage.images_bytes
    return {**lines, "buffers_bytes": stage.buffers_bytes + stage.reserve_bytes, "total_bytes": stage.total_bytes}
