"""A router of your own, tried in a training run before it becomes a kind.

  python examples/own_router.py --out runs/own_router

A router is a rule from logits to a choice of experts. This script writes one and puts it in the place of top-k for this
process alone, then trains the tiny model with each and compares loss and load of the experts. docs/extending.md says
how a router becomes a kind that configurations can name.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package lies beside examples/

import torch
from torch import Tensor

from gpt4moe import train
from gpt4moe.config.moe import RouterKind
from gpt4moe.moe.routers import ROUTERS
from gpt4moe.moe.routers.base import Choice, Router, best

STEPS = 8


class SoftplusTopK(Router):
    """Score = sqrt(softplus(logit)), renormalised over the K best: no expert's score depends on another expert's."""

    def choose(self, logits: Tensor) -> Choice:
        """logits [T, E] fp32 -> K experts of each token and their weights."""
        score = torch.nn.functional.softplus(logits).sqrt()
        expert_index, margin = best(score, self.top_k)
        chosen = score.gather(1, expert_index)
        weight = chosen / chosen.sum(dim=-1, keepdim=True)
        probability = score / score.sum(dim=-1, keepdim=True)
        return Choice(probability, expert_index, weight, expert_index, margin)


def last_metrics(out: Path, name: str, router: type[Router]) -> dict[str, float]:
    """The last step's metrics of a short run with this router in the place of top-k."""
    before, ROUTERS[RouterKind.topk] = ROUTERS[RouterKind.topk], router
    try:
        status = train.main(
            ["+experiment=tiny", "data=mock", f"run.root={out}", f"run.name={name}", f"training.steps={STEPS}",
             "tracking.wandb=disabled"]
        )  # fmt: skip
    finally:
        ROUTERS[RouterKind.topk] = before
    assert status == 0, status
    record: dict[str, float] = json.loads((out / name / "metrics.jsonl").read_text().splitlines()[-1])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the two run folders go; new")
    out = parser.parse_args().out
    routers = {"topk": ROUTERS[RouterKind.topk], "softplus": SoftplusTopK}
    rows = {name: last_metrics(out, name, router) for name, router in routers.items()}
    sys.stdout.write(f"after {STEPS} steps    loss  busiest expert / mean\n")
    for name, row in rows.items():
        sys.stdout.write(f"{name:14} {row['loss']:9.4f}  {row['expert_load_max_over_mean']:22.2f}\n")


if __name__ == "__main__":
    main()
