"""Every layout, engine and router takes its steps on a fake GPU, with no more host syncs and kernels than recorded."""

import json
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.gpu_rehearsal import guard
from tests.gpu_rehearsal.counts import CASES, CUDA_BUILD, FAULTS, RECORDED, stack

ALLOWED = 1.03


@pytest.fixture(scope="module")
def rehearsed() -> dict[str, dict[str, Any]]:
    """All cases and faults, in one process of its own: torch must not be imported before the guard."""
    if guard.is_cuda_build(guard.torch_folder()):
        pytest.skip(CUDA_BUILD)
    command = [sys.executable, "-m", "tests.gpu_rehearsal.counts"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """Of this stack. Of another one that nobody recorded yet, the first in the file without kernels and operations,
    which differ between releases of Megatron."""
    stacks = json.loads(RECORDED.read_text())
    if stack() in stacks:
        return stacks[stack()]
    first = next(iter(stacks.values()))
    return {case: {key: row[key] for key in ("host_syncs", "collectives")} for case, row in first.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_refuses_nothing(case: str, rehearsed: dict[str, Any]) -> None:
    assert rehearsed[case]["problems"] == []
    assert rehearsed[case]["kernels_per_layer"] > 100


@pytest.mark.parametrize("case", CASES)
def test_counts_stay_within_3_percent_of_the_recorded(
    case: str, rehearsed: dict[str, Any], recorded: dict[str, Any]
) -> None:
    assert risen(rehearsed[case]["counts"], recorded[case]) == [], (
        "If that is meant: python -m tests.gpu_rehearsal.counts --write"
    )


def risen(counts: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What is new, or more than 3% above the recorded."""
    found = []
    for name, old in recorded.items():
        new = counts[name]
        if isinstance(old, dict):
            found += [f"{key}: {n}, recorded {old.get(key, 0)}" for key, n in new.items() if n > limit(old.get(key, 0))]
        elif new > limit(old):
            found.append(f"{name}: {new}, recorded {old}")
    return found


def limit(recorded: int) -> int:
    return ceil(recorded * ALLOWED) if recorded > 100 else recorded


def test_a_new_host_sync_and_many_more_kernels_are_risen() -> None:
    old = {"host_syncs": {"a": 8}, "kernels": 1000}
    assert risen({"host_syncs": {"a": 8}, "kernels": 1030}, old) == []
    assert risen({"host_syncs": {"a": 8, "b": 1}, "kernels": 1031}, old) == [
        "b: 1, recorded 0", "kernels: 1031, recorded 1000",
    ]  # fmt: skip


def test_the_router_s_split_is_the_only_wait_of_a_layer(rehearsed: dict[str, Any]) -> None:
    syncs = rehearsed["tp2 ep2"]["host_syncs"]
    layers = {place: count for place, count in syncs.items() if "gpt4moe/moe/" in place}
    assert list(layers.values()) == [2 * 2]  # layers x micro-batches
    assert sum(syncs.values()) - 4 <= 4  # of the step


def test_bf16_attention_is_flash(rehearsed: dict[str, Any]) -> None:
    assert rehearsed["tp2 ep2"]["attention"] == {"flash": 2 * 2}
    assert list(rehearsed["cp2"]["attention"]) == ["flash"]  # with grouped queries, and no mask
    assert list(rehearsed["fp32"]["attention"]) == ["math: float32 with grouped queries"]


def test_the_ceiling_is_below_what_its_matrix_products_allow(rehearsed: dict[str, Any]) -> None:
    data = rehearsed["one process"]
    assert 0 < data["mfu_ceiling"] < 0.72 and data["is_measured"] is False
    assert data["parts"]["expert products"]["flops"] > data["parts"]["attention"]["flops"] > 0


def test_an_item_in_a_layer_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    syncs = rehearsed["item in a layer"]["host_syncs"]
    (place,) = [place for place in syncs if "item_in_a_layer" in place]
    assert place.startswith("tests/gpu_rehearsal/faults.py:") and syncs[place] == 2


def test_a_tensor_made_on_the_cpu_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    problems = rehearsed["tensor on the CPU"]["problems"]
    assert any("tests/gpu_rehearsal/faults.py:" in p and "mul mixes devices: cuda" in p for p in problems)


def test_a_refused_kernel_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    (problem,) = rehearsed["offsets of a wrong dtype"]["problems"]
    assert problem.startswith("tests/gpu_rehearsal/faults.py:") and "int32" in problem


def test_attention_with_a_mask_and_grouped_queries_keeps_its_scores(rehearsed: dict[str, Any]) -> None:
    data = rehearsed["mask in attention"]
    (kernel,) = data["attention"]
    assert kernel == "math: a mask (64, 64) with grouped queries"
    assert data["attention_bytes"] == {kernel: 4 * 4 * 4 * 64 * 64}  # fp32 x B x N x S x S


def test_every_case_and_fault_is_recorded_or_planted(rehearsed: dict[str, Any], recorded: dict[str, Any]) -> None:
    assert set(rehearsed) == set(CASES) | set(FAULTS) and set(recorded) == set(CASES)
