"""What the numbers of metrics.jsonl mean."""

import math
from pathlib import Path

import pytest

from gpt4moe.config.optimizer import ScheduleConfig, ScheduleKind
from gpt4moe.training.learning_rate import learning_rate
from tests.training.command import BATCH, SEQ, metrics, train

EVERY_STEP = {
    "step", "loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "consumed_tokens", "step_seconds",
    "tokens_per_second",
}  # fmt: skip


def first_step(folder: Path, *overrides: str) -> dict[str, float]:
    (ended,) = train(folder, "training.steps=1", *overrides)
    assert ended.status == 0, ended.err
    return metrics(folder)[0]


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return first_step(tmp_path_factory.mktemp("runs") / "x")


def test_every_step_has_the_promised_keys_and_plain_numbers(whole_run: Path) -> None:
    for record in metrics(whole_run, timings=True):
        assert set(record) >= EVERY_STEP
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in record.values())


def test_steps_tokens_and_speed_are_counted(whole_run: Path) -> None:
    for number, record in enumerate(metrics(whole_run, timings=True), start=1):
        assert record["step"] == number
        assert record["consumed_tokens"] == number * BATCH * SEQ
        assert record["tokens_per_second"] == pytest.approx(BATCH * SEQ / record["step_seconds"])


def test_held_out_loss_is_there_where_evaluated(tmp_path: Path) -> None:
    assert train(tmp_path / "x", "training.steps=5", "training.eval_every=2")[0].status == 0
    assert [record["step"] for record in metrics(tmp_path / "x") if "eval_loss" in record] == [2, 4, 5]


def test_the_same_command_under_two_names_gives_the_same_bits(tmp_path: Path) -> None:
    overrides = ("parallel.tp=2", "parallel.ep=2", "training.steps=3", "training.eval_every=2")
    for name in ("a", "b"):
        assert train(tmp_path / name, *overrides, ranks=2)[0].status == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != []


def test_training_lowers_the_loss_from_that_of_a_guess(whole_run: Path) -> None:
    losses = [record["loss"] for record in metrics(whole_run)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.05)  # small initial weights: every token equally likely
    assert losses[-1] < losses[0] - 0.3


def test_the_loss_has_no_auxiliary_terms(tmp_path: Path, one_step: dict[str, float]) -> None:
    heavy = first_step(
        tmp_path / "x", "model.moe.router.load_balancing_coefficient=1", "model.moe.router.z_loss_coefficient=0.1"
    )
    assert heavy["loss"] == one_step["loss"]
    assert heavy["grad_norm"] != one_step["grad_norm"]
    assert heavy["aux_loss"] == pytest.approx(100 * one_step["aux_loss"])  # scaled by its coefficient, 0.01 before


@pytest.mark.parametrize("pattern", ["[1,1]", "[0,1]", "[1,0]"])
def test_auxiliary_losses_are_means_over_the_moe_layers(pattern: str, tmp_path: Path) -> None:
    # Where routers start, their losses are known: nearly even probabilities balance to 1, and the logsumexp of four
    # nearly equal logits is log 4. A sum over layers would be twice that, a mean over all layers half of it.
    record = first_step(
        tmp_path / "x", f"model.moe.layer_pattern={pattern}", "model.ffn_hidden_size=64",
        "model.moe.router.load_balancing_coefficient=0.01", "model.moe.router.z_loss_coefficient=0.01",
    )  # fmt: skip
    assert record["aux_loss"] == pytest.approx(0.01, rel=0.1)
    assert record["z_loss"] == pytest.approx(0.01 * math.log(4) ** 2, rel=0.1)


def test_a_dense_model_has_auxiliary_losses_of_zero(tmp_path: Path) -> None:
    record = first_step(tmp_path / "x", "model.moe=null", "model.ffn_hidden_size=64")
    assert (record["aux_loss"], record["z_loss"]) == (0, 0)


def test_the_gradient_norm_is_the_one_before_clipping(tmp_path: Path, one_step: dict[str, float]) -> None:
    clipped = first_step(tmp_path / "x", "optimizer.clip_norm=0.001")
    assert clipped["grad_norm"] == one_step["grad_norm"] > 0.1


def test_the_learning_rate_is_that_of_the_step_taken(whole_run: Path) -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.cosine, total_steps=20, warmup_steps=2, final_fraction=0.1)
    for record in metrics(whole_run):
        assert record["learning_rate"] == learning_rate(int(record["step"]), 0.002, schedule)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        # step 1, half of the warm-up; 4, its end; 12, half of the way down to 10%; 20, the end; 99, long after
        (ScheduleKind.cosine, {1: 0.25, 2: 0.5, 4: 1.0, 8: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 12: 0.55, 20: 0.1}),
        (ScheduleKind.linear, {1: 0.25, 4: 1.0, 8: 0.775, 12: 0.55, 20: 0.1, 99: 0.1}),
        (ScheduleKind.constant, {1: 0.25, 4: 1.0, 12: 1.0, 20: 1.0, 99: 1.0}),
    ],
)
def test_the_schedule_warms_up_and_falls(kind: ScheduleKind, rates: dict[int, float]) -> None:
    schedule = ScheduleConfig(kind=kind, total_steps=20, warmup_steps=4, final_fraction=0.1)
    for step, rate in rates.items():
        assert learning_rate(step, 3e-4, schedule) == pytest.approx(3e-4 * rate), step


def test_a_schedule_of_nothing_but_warm_up_reaches_its_peak() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.cosine, total_steps=4, warmup_steps=4)
    assert [learning_rate(step, 1.0, schedule) for step in (1, 4)] == [0.25, 1.0]


def test_without_warm_up_the_first_step_is_nearly_the_peak() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.linear, total_steps=10, warmup_steps=0, final_fraction=0.0)
    assert learning_rate(1, 1.0, schedule) == pytest.approx(0.9)
