"""Rehearses the cases one after the other in one process without a GPU, and records their counts.

python -m tests.gpu_rehearsal.counts --write [CASE ...]   records these cases in counts.json again, or all
python -m tests.gpu_rehearsal.counts [CASE ...]           prints these as JSON, or all and the faults: the tests
"""

import gc
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from gpt4moe.gpu_rehearsal import command, guard
from tests.gpu_rehearsal.cases import CASES, FAULTS, GENERATION, overrides

RECORDED = Path(__file__).with_name("counts.json")


def stack() -> str:
    """What the counts of kernels and operations belong to."""
    return f"torch {version('torch').split('+')[0]}, megatron-core {version('megatron-core')}"


def rehearse_all(cases: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Case or fault -> report.as_data (of generation: its problems and attention), and `counts`: what is recorded."""
    guard.load()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    from gpt4moe.gpu_rehearsal import report, steps
    from tests.gpu_rehearsal import faults

    found = {}
    gc.collect()
    gc.freeze()  # the collections before each case, and those within, then pass over what was imported
    for case in cases:
        # The case before leaves an engine of DeepSpeed. Collected amid this case, it would wait for the GPU in __del__.
        gc.collect()
        request = command.read(overrides(case))
        run, layout = command.checked(request)
        with ExitStack() as stack:
            if case in FAULTS:
                stack.enter_context(faults.planted(case))
            if case.startswith("padding"):
                stack.enter_context(_padding())
            if "generati" in case:
                found[case] = _generated(run, layout)
                continue
            done = steps.rehearse(run, layout, request.rank)
        evaluation = {"evaluation_host_syncs": _by_place(done.evaluation_syncs)}
        found[case] = report.as_data(done) | {"counts": counts(done.notes) | evaluation, "chose": chose(run)}
    return found


def _padding() -> Any:
    """The host then sees padding in the global batch, and every layer masks it."""
    from gpt4moe.gpu_rehearsal.recorder import Answers

    of = Answers.of
    return mock.patch.object(Answers, "of", lambda *given: replace(of(*given), padding=1.0))


def _generated(run: Any, layout: Any) -> dict[str, Any]:
    """Three tokens after a prompt of four, by a model without an engine."""
    from gpt4moe.gpu_rehearsal import steps
    from gpt4moe.gpu_rehearsal.recorder import Notes
    from gpt4moe.gpu_rehearsal.roofline import Roofline
    from gpt4moe.inference.generation import Generator
    from gpt4moe.inference.requests import Limits, Request

    notes = Notes(Roofline.of(run))
    with steps.fake_rank(run, layout, 0, notes) as rank:
        with rank.recorder:
            (chunk,) = steps.build_chunks(run, rank)
        notes.clear()
        with rank.recorder:
            limits = Limits(cache_bytes=10**9)
            list(
                Generator([chunk], run, rank.groups, limits=limits).generate(
                    [Request(prompt=[1, 2, 3, 4], max_tokens=3)]
                )
            )
    return {
        "problems": list(notes.problems),
        "attention": notes.attention_calls,
        "chose": chose(run),
        "counts": counts(notes),
    }


def chose(run: Any) -> dict[str, Any]:
    """What the table of cases must cover."""
    router = run.model.moe.router if run.model.moe else None
    return {
        "engine": run.engine.kind, "dtype": run.precision.dtype, "recompute": run.parallel.recompute,
        "experts": run.kernels.experts, "router": router and router.kind,
        "scope": router and router.load_balancing_scope,
        "drop_policy": router and router.capacity_factor and router.drop_policy,
        "noise": bool(router and router.input_jitter), "tied": run.model.tied_embeddings, "qk_norm": run.model.qk_norm,
    }  # fmt: skip


def counts(notes: Any) -> dict[str, Any]:
    """Counts that do not depend on the machine."""
    return {
        "host_syncs": _by_place(notes.host_syncs),
        "overlapped_waits": {place.without_line: waits.count for place, waits in notes.overlapped.items()},
        "collectives": dict(sorted(notes.collectives.items())),
        "kernels": notes.kernels,
        "aten_operations": notes.aten_operations,
        "allocations": notes.allocations,
        "allocated_bytes": notes.allocated_bytes,
        "largest_allocation_bytes": notes.largest[0],
    }


def _by_place(host_syncs: Counter[tuple[Any, str]]) -> dict[str, int]:
    """Places are without lines, so that other edits do not move them."""
    syncs: dict[str, int] = {}
    for (place, what), count in host_syncs.items():
        key = f"{place.without_line} ({what})"
        syncs[key] = syncs.get(key, 0) + count
    return dict(sorted(syncs.items()))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--write"]:
        recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        found = rehearse_all(arguments[1:] or [*CASES, *GENERATION])
        for case, data in found.items():
            for problem in data["problems"]:
                print(f"{case}: {problem}", file=sys.stderr)
        if any(data["problems"] for data in found.values()):
            return 1
        known = recorded.get(stack(), {}) | {case: data["counts"] for case, data in found.items()}
        recorded[stack()] = {case: known[case] for case in (*CASES, *GENERATION)}
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    else:
        sys.stdout.write(json.dumps(rehearse_all(arguments or [*CASES, *GENERATION, *FAULTS])) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
