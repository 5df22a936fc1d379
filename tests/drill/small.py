"""A run folder, events and outcomes of a drill in a few lines, for tests without a launch."""

import json
from pathlib import Path
from typing import Any

from gpt4moe.drill.account import Outcome
from gpt4moe.drill.kinds import Fault


def run(folder: Path, losses: dict[int, float], weights: bytes = b"w") -> Path:
    step = folder / "checkpoints" / f"step-{max(losses):08d}"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (step / "rank-00000.safetensors").write_bytes(weights)
    lines = [json.dumps({"step": number, "loss": loss, "step_seconds": 1.0}) for number, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def outcome(number: int, came: float, detect: float, *, kind: str = "kill_all", moment: str = "step") -> Outcome:
    fault = Fault(number=number, kind=kind, moment=moment, step=number, rank=0)
    return Outcome(fault=fault, status=137, came_at=came, detect_seconds=detect)


def event(kind: str, time: float, **fields: Any) -> str:
    unknown = dict.fromkeys(("job", "submitted", "job_started", "last_sign_of_life"))
    start = {
        "run": "x",
        "ranks": 1,
        "layout": "",
        "total_steps": 9,
        **unknown,
        "redone_steps": 0,
        "redone_seconds": 0.0,
    }
    return json.dumps({"event": kind, "time": time, **(start if kind == "start" else {}), **fields})
