"""Records and expert loads as a run would leave them, for the figures and the report."""

import math

from gpt4moe.runlog.expert_load import ExpertLoad
from gpt4moe.runlog.metrics import Record


def falling_loss(num_steps: int, *, eval_every: int = 10) -> list[Record]:
    """Records 1..num_steps; the held-out loss lies 0.04 above the training loss and ends below 4."""
    records: list[Record] = []
    for step in range(1, num_steps + 1):
        loss = 3.5 + 5.0 * math.exp(-8 * step / num_steps) + 0.05 * math.sin(17.0 * step)
        record: Record = {
            "step": step, "loss": loss, "aux_loss": 0.01, "grad_norm": 1.0 + 1.0 / step, "learning_rate": 1e-3 / step,
            "consumed_tokens": step * 4096, "step_seconds": 0.5, "tokens_per_second": 8192.0,
        }  # fmt: skip
        if step % eval_every == 0:
            record["eval_loss"] = loss + 0.04
        records.append(record)
    return records


def uneven_load(num_layers: int = 2, num_experts: int = 4) -> ExpertLoad:
    """Expert 1 of the second layer is dead; expert 0 everywhere is the busiest."""
    tokens = [[300.0] + [100.0] * (num_experts - 1) for _ in range(num_layers)]
    tokens[1][1] = 0.0
    return ExpertLoad(layers=[2 * row for row in range(num_layers)], tokens=tokens)
