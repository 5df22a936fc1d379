"""Every layout, engine and router takes its steps on a fake GPU, with no more host syncs and kernels than recorded."""

import json
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.config.moe import DropPolicy, LoadBalancingScope, RouterKind
from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.parallel import Recompute
from gpt4moe.gpu_rehearsal import guard
from gpt4moe.gpu_rehearsal.roofline import ENOUGH_SECONDS
from tests.distributed.layouts import LAYOUTS
from tests.gpu_rehearsal.cases import CASES, CUDA_BUILD, FAULTS, GENERATION
from tests.gpu_rehearsal.counts import RECORDED, stack

pytestmark = pytest.mark.timeout(900)
"""One process rehearses all cases before the first test: three minutes of a core of its own."""

ALLOWED = 1.03
AWAITED = "gpt4moe/moe/expert_rows.py listed"
SAME_ON_STACKS = ("host_syncs", "overlapped_waits", "collectives", "evaluation_host_syncs")


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
    return {case: {key: row[key] for key in SAME_ON_STACKS if key in row} for case, row in first.items()}


@pytest.mark.parametrize("case", [*CASES, *GENERATION])
def test_a_gpu_refuses_nothing(case: str, rehearsed: dict[str, Any]) -> None:
    assert rehearsed[case]["problems"] == []
    assert rehearsed[case]["counts"]["kernels"] > 100


@pytest.mark.parametrize("case", [*CASES, *GENERATION])
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


def test_no_layer_waits_for_the_gpu_but_for_numbers_behind_which_more_work_is_queued(rehearsed: dict[str, Any]) -> None:
    counts = rehearsed["tp2 ep2"]["counts"]
    assert counts["overlapped_waits"] == {AWAITED: 2 * 2}  # layers x micro-batches
    assert not [place for place in counts["host_syncs"] if "gpt4moe/moe/" in place]
    assert sum(counts["host_syncs"].values()) <= 4  # of the step
    (waits,) = rehearsed["tp2 ep2"]["overlapped_waits"].values()
    assert waits["least_kernels"] >= 10 and waits["least_seconds"] >= ENOUGH_SECONDS


def test_numbers_that_are_awaited_at_once_are_a_host_sync(rehearsed: dict[str, Any]) -> None:
    counts = rehearsed["counts awaited at once"]["counts"]
    waits = [count for place, count in counts["host_syncs"].items() if "expert_rows.py" in place]
    assert waits == [1] and counts["overlapped_waits"] == {}


@pytest.mark.parametrize("fault", ["counts never awaited, large", "event before the copy, large"])
def test_numbers_that_are_read_before_their_copy_is_awaited_are_a_problem(
    rehearsed: dict[str, Any], fault: str
) -> None:
    (problem,) = rehearsed[fault]["problems"]
    assert "expert_rows.py" in problem and "has not waited for" in problem


def test_bf16_attention_is_flash(rehearsed: dict[str, Any]) -> None:
    assert rehearsed["tp2 ep2"]["attention"] == {"flash": 2 * 2}
    for engine in EngineKind:
        assert list(rehearsed[f"cp2, {engine.value}"]["attention"]) == ["flash"]  # with grouped queries, and no mask
    for case in ("fp32, per_expert", "fp32, tp2 cp2 ep2"):
        assert set(rehearsed[case]["attention"]) == {"math: float32 with grouped queries"}
    kernels = {name: rehearsed[name]["attention"] for name in GENERATION}
    assert kernels == {
        "generation": {"flash": 2 * 3}, "generation, group_limited": {"flash": 3},
        # The prompt, then two tokens, whose heads of a group are queries of one head of keys.
        "generation in fp32": {"math: float32 with grouped queries": 1, "memory-efficient: float32": 2},
    }  # fmt: skip


def test_documents_are_one_call_of_flash_attention_and_a_part_of_its_work(rehearsed: dict[str, Any]) -> None:
    """Four documents of equal length in a sequence, with the host waits of a run without documents."""
    parted, whole = rehearsed["documents"], rehearsed["one process"]
    assert parted["attention"] == whole["attention"] == {"flash": 2 * 2}
    assert parted["parts"]["attention"]["flops"] * 4 == whole["parts"]["attention"]["flops"]
    assert parted["counts"]["host_syncs"] == whole["counts"]["host_syncs"]
    assert list(rehearsed["documents, cp2, selective"]["attention"]) == ["flash"]


def test_a_generated_token_is_one_wait_for_the_gpu(rehearsed: dict[str, Any]) -> None:
    syncs = rehearsed["generation"]["counts"]["host_syncs"]
    assert sum(syncs.values()) == 3 and all("gpt4moe/inference/" in place for place in syncs)


def test_before_hopper_each_expert_has_products_of_its_own_and_none_waits(rehearsed: dict[str, Any]) -> None:
    """Two products of an expert, and two gradients of each; one layer, one micro-batch, four experts on the rank."""
    older, looped = rehearsed["grouped_mm on an A100"], rehearsed["per_expert in bf16"]
    assert older["parts"]["expert products"]["kernels"] == 6 * 4 <= looped["parts"]["expert products"]["kernels"]
    for case in (older, looped):
        assert not [place for place in case["host_syncs"] if "gpt4moe/moe/" in place]
        assert case["counts"]["overlapped_waits"] == {AWAITED: 1}


def test_gradients_of_weights_are_added_by_their_own_products(rehearsed: dict[str, Any]) -> None:
    """Of eight experts by one kernel, or, where their products are large, by eight products of torch."""
    kernels = {}
    for case in ("one layer", "large products of experts", "weight gradients by autograd"):
        parts = rehearsed[case]["parts"]
        kernels[case] = [parts[part]["kernels"] for part in ("expert products", "gradient accumulation")]
    small, large, plain = kernels.values()
    assert small[0] == plain[0] == 6 + 1  # two products, two gradients of each, where the rows of each expert end
    assert large[0] == 6 * 8
    assert plain[1] - small[1] == 2 + 3 and large[1] == small[1]  # gate and up, down; qkv, the projection, the output
    waits = [rehearsed[case]["counts"]["overlapped_waits"] for case in kernels]
    assert waits == [{}, {AWAITED: 1}, {}]  # one process sends nothing, and a grouped product asks the host nothing


def test_padding_noise_and_drops_add_no_wait(rehearsed: dict[str, Any]) -> None:
    """How many rows are sent is known to the GPU alone then: they are among the numbers that are awaited anyway."""
    plain = set(rehearsed["recompute=moe"]["counts"]["host_syncs"])
    for name, forward_passes in (
        ("recompute=moe", 1), ("padding", 1), ("topk: drops by probability", 1),
        ("group_limited, everything recomputed", 2),
    ):  # fmt: skip
        assert set(rehearsed[name]["counts"]["host_syncs"]) <= plain, name
        assert rehearsed[name]["counts"]["overlapped_waits"] == {AWAITED: forward_passes}, name


def test_the_cases_cover_what_a_run_may_choose(rehearsed: dict[str, Any]) -> None:
    chosen: dict[str, set[Any]] = {}
    for case in (*CASES, *GENERATION):
        for key, value in rehearsed[case]["chose"].items():
            chosen.setdefault(key, set()).add(value)
    for key, kinds in {
        "engine": EngineKind, "dtype": Dtype, "recompute": Recompute, "router": RouterKind, "drop_policy": DropPolicy,
        "scope": LoadBalancingScope,
    }.items():  # fmt: skip
        assert chosen[key] - {None} == {kind.value for kind in kinds}, key
    assert chosen["experts"] == {ExpertKernel.auto.value, ExpertKernel.per_expert.value}
    assert chosen["noise"] == chosen["tied"] == chosen["qk_norm"] == {True, False}
    assert {f"{name}, {engine.value}" for name in LAYOUTS for engine in EngineKind} <= set(CASES)


def test_the_ceiling_is_below_what_its_matrix_products_allow(rehearsed: dict[str, Any]) -> None:
    data = rehearsed["one process"]
    assert 0 < data["mfu_ceiling"] < 0.72 and data["is_measured"] is False
    assert data["parts"]["expert products"]["flops"] > data["parts"]["attention"]["flops"] > 0


def test_an_item_and_an_assignment_by_a_mask_are_found_with_their_lines(rehearsed: dict[str, Any]) -> None:
    syncs = rehearsed["item in a layer"]["host_syncs"]
    places = {place: count for place, count in syncs.items() if "item_in_a_layer" in place}
    assert all(place.startswith("tests/gpu_rehearsal/faults.py:") for place in places)
    assert {place.partition("(")[2]: count for place, count in places.items()} == {
        "item)": 2, "assignment by a mask)": 1, "all_gather_object)": 1,
    }  # fmt: skip


def test_a_tensor_made_on_the_cpu_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    problems = rehearsed["tensor on the CPU"]["problems"]
    assert any("tests/gpu_rehearsal/faults.py:" in p and "mul mixes devices: cuda" in p for p in problems)
    assert any("tests/gpu_rehearsal/faults.py:" in p and "mm mixes dtypes: bfloat16, float32" in p for p in problems)


def test_a_refused_kernel_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    (problem,) = rehearsed["offsets of a wrong dtype"]["problems"]
    assert problem.startswith("tests/gpu_rehearsal/faults.py:") and "int32" in problem


def test_attention_with_a_mask_and_grouped_queries_keeps_its_scores(rehearsed: dict[str, Any]) -> None:
    data = rehearsed["mask in attention"]
    (kernel,) = data["attention"]
    assert kernel == "math: a mask (64, 64) with grouped queries"
    assert data["attention_bytes"] == {kernel: 4 * 4 * 4 * 64 * 64}  # fp32 x B x N x S x S


def test_a_large_copy_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    made = rehearsed["large copy"]["allocations"]
    assert made["largest_bytes"] == 16 * 64 * 4 * 4 * 16 * 8  # 16 x S x B x N x D in fp64
    assert made["largest_at"].startswith("tests/gpu_rehearsal/faults.py:") and "large_copy" in made["largest_at"]
    assert rehearsed["one process"]["allocations"]["largest_bytes"] < made["largest_bytes"]


def test_an_operation_without_a_deterministic_kernel_is_found_with_its_line(rehearsed: dict[str, Any]) -> None:
    problems = rehearsed["floats added up, deterministic"]["problems"]
    assert all("tests/gpu_rehearsal/faults.py:" in p and "cumsum adds in any order" in p for p in problems) and problems


def test_a_deterministic_step_waits_no_more_for_the_gpu(rehearsed: dict[str, Any]) -> None:
    ordered, usual = rehearsed["deterministic"]["counts"], rehearsed["tp2 ep2"]["counts"]
    assert ordered["host_syncs"] == usual["host_syncs"] and ordered["collectives"] == usual["collectives"]


def test_a_norm_that_is_made_on_the_cpu_is_found_where_no_engine_moves_it(rehearsed: dict[str, Any]) -> None:
    problems = rehearsed["norm on the CPU, generating"]["problems"]
    assert any("3 tensors are not made on the GPU" in problem for problem in problems)
    assert any("rms_norm mixes devices" in problem and "inference" in problem for problem in problems)


def test_every_case_and_fault_is_recorded_or_planted(rehearsed: dict[str, Any], recorded: dict[str, Any]) -> None:
    cases = {*CASES, *GENERATION}
    assert set(rehearsed) == cases | set(FAULTS) and set(recorded) == cases
