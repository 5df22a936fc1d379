"""The ceiling follows from bytes, FLOPs and the stated shares."""

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.gpu_rehearsal.roofline import Assumptions, Roofline
from gpt4moe.parallel.layout import Layout


def test_a_kernel_takes_the_longest_of_bytes_flops_and_launch() -> None:
    shares = Assumptions(memory=0.5, dense=0.5, grouped=0.25, triton=0.2, flash=0.1, kernel_seconds=1.0)
    roofline = Roofline(100.0, 10.0, shares)
    for name, memory, flops in (("mm", 10, 200), ("mm", 40, 200), ("_grouped_mm", 10, 200), ("fill_", 1, 0)):
        roofline.add(name, "a part", memory, flops)
    assert roofline.bound_seconds == 4 + 8 + 8 + 1
    roofline.add("triton_grouped_gradient", "another", 10, 200)
    assert roofline.bound_seconds == 21 + 10
    part = roofline.parts["a part"]
    assert (part.kernels, part.memory_bytes, part.flops) == (4, 61, 600)


def test_flash_attention_is_assumed_to_reach_more_of_an_a100() -> None:
    given = ["+experiment=tiny", "run.name=x"]
    clusters = [load_run_config([*given, f"cluster={name}"]).cluster for name in ("a100_80g", "h200_141g")]
    shares = [Assumptions.of(cluster).flash for cluster in clusters]
    assert shares == [0.60, 0.36]


def test_the_bubble_of_a_pipeline_is_a_part() -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x", "data=mock", "parallel.pp=2"])
    layout = Layout.from_config(run.parallel, 2)
    roofline = Roofline.of(run)
    roofline.with_bubble(run, layout, 8.0)
    assert roofline.parts["pipeline bubble"].bound_seconds == 8.0 * (2 - 1) / (16 / 2)


def test_the_ceiling_is_model_flops_over_peak() -> None:
    run = load_run_config(["+experiment=mixtral_slice", "run.name=x"])
    layout = Layout.from_config(run.parallel, 1)
    roofline = Roofline.of(run)
    assert roofline.mfu(run, layout) == 0.0
    # 6 x (2 layers of 2 x 176M + 42M elements, and a head of 131M) and attention: 5.7 GFLOP a token.
    roofline.add("mm", "dense", 0, 5.7e9 * 4 * 4096)
    assert roofline.mfu(run, layout) == pytest.approx(0.72, rel=0.05)
