"""The cases that the GPU rehearsal's tests share, rehearsed one after the other in one process without a GPU.

python -m tests.gpu_rehearsal.counts --write      records counts.json again
python -m tests.gpu_rehearsal.counts              prints all cases as JSON; the tests start it once
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt4moe.gpu_rehearsal import command, guard

RECORDED = Path(__file__).with_name("counts.json")
BASE = (
    "+experiment=tiny", "data=mock", "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4",
    "model.num_query_groups=2", "model.seq_length=64", "model.vocab_size=128", "model.moe.num_experts=8",
    "model.moe.ffn_hidden_size=96", "model.moe.router.capacity_factor=null", "training.global_batch_size=4",
    "training.micro_batch_size=2", "precision=bf16",
)  # fmt: skip
CASES = {
    "one process": (),
    "fp32": ("precision=fp32",),
    "tp2 ep2": ("parallel.tp=2", "parallel.ep=2"),
    "pp2 ep2": ("parallel.pp=2", "parallel.ep=2"),
    "pp2 vpp2, last stage": ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", "rank=1"),
    "cp2": ("parallel.cp=2",),
    "etp2 ep2": ("parallel.ep=2", "parallel.etp=2", "training.micro_batch_size=1"),
    "ep2, deepspeed": ("parallel.ep=2", "engine=deepspeed"),
    "ep2, recompute=moe": ("parallel.ep=2", "parallel.recompute=moe"),
    "ep2, recompute=full": ("parallel.ep=2", "parallel.recompute=full"),
    "ep2, sigmoid_bias": ("parallel.ep=2", "router@model.moe.router=sigmoid_bias"),
    "ep2, group_limited": ("parallel.ep=2", "router@model.moe.router=group_limited"),
    "ep2, switch": ("parallel.ep=2", "router@model.moe.router=switch", "model.moe.top_k=1"),
    "ep2, capacity": ("parallel.ep=2", "model.moe.router.capacity_factor=1.25"),
    "ep2, per_expert": ("parallel.ep=2", "kernels.experts=per_expert"),
}  # fmt: skip
FAULTS = ("item in a layer", "tensor on the CPU", "offsets of a wrong dtype", "mask in attention")
"""Planted one at a time by `tests.gpu_rehearsal.faults`."""
CUDA_BUILD = "a CUDA build of torch: the GPU rehearsal refuses it, and needs the CPU build"
"""Why its tests are skipped."""


def overrides(case: str) -> list[str]:
    """What the tool would be given for a case. Routers set their own capacity, so BASE's comes after them."""
    extra = CASES.get(case, ("model.num_layers=1", "training.micro_batch_size=4"))
    return [*(o for o in extra if o.startswith("router@")), *BASE, *(o for o in extra if not o.startswith("router@"))]


def stack() -> str:
    """What the counts of kernels and operations belong to."""
    return f"torch {version('torch').split('+')[0]}, megatron-core {version('megatron-core')}"


def rehearse_all(cases: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Case or fault -> report.as_data, and `counts`: what is recorded of it."""
    guard.load()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from gpt4moe.gpu_rehearsal import report, steps
    from tests.gpu_rehearsal import faults

    found = {}
    for case in cases:
        with ExitStack() as stack:
            if case in FAULTS:
                stack.enter_context(faults.planted(case))
            request = command.read(overrides(case))
            done = steps.rehearse(*command.checked(request), request.rank)
        found[case] = report.as_data(done) | {"counts": counts(done)}
    return found


def counts(done: Any) -> dict[str, Any]:
    """Counts that do not depend on the machine. Places are without lines, so that other edits do not move them."""
    syncs: dict[str, int] = {}
    for (place, what), count in done.notes.host_syncs.items():
        key = f"{place.without_line} ({what})"
        syncs[key] = syncs.get(key, 0) + count
    return {
        "host_syncs": dict(sorted(syncs.items())),
        "collectives": dict(sorted(done.collectives.items())),
        "kernels": done.notes.kernels,
        "aten_operations": done.aten_operations,
    }


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        found = rehearse_all(CASES)
        for case, data in found.items():
            for problem in data["problems"]:
                print(f"{case}: {problem}", file=sys.stderr)
        if any(data["problems"] for data in found.values()):
            return 1
        recorded[stack()] = {case: data["counts"] for case, data in found.items()}
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    else:
        sys.stdout.write(json.dumps(rehearse_all([*CASES, *FAULTS])) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
