"""WSD: warm-up, stable, decay; and keys that only one kind of schedule reads. The other kinds are in test_metrics."""

from itertools import pairwise

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.optimizer import SCHEDULE_KEYS, ScheduleKind
from gpt4moe.errors import ConfigError
from gpt4moe.training.learning_rate import learning_rate

TINY = ["+experiment=tiny", "run.name=x", "schedule.total_steps=100", "schedule.warmup_steps=10"]
WSD = [*TINY, "schedule=wsd", "schedule.decay_share=0.2"]


def rates(*steps: int, overrides: list[str]) -> list[float]:
    schedule = load_run_config(overrides).schedule
    return [learning_rate(step, 1.0, schedule) for step in steps]


def test_wsd_warms_up_stays_at_the_peak_and_decays_over_the_last_share_of_the_steps() -> None:
    # Step 90 is half of the decay, so the square root of the final tenth.
    found = rates(5, 10, 11, 80, 90, 100, 500, overrides=WSD)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.1**0.5, 0.1, 0.1])


def test_every_step_of_the_decay_is_the_same_factor() -> None:
    decay = rates(*range(80, 101), overrides=WSD)
    factors = [after / before for before, after in pairwise(decay)]
    assert factors == pytest.approx([0.1 ** (1 / 20)] * 20)


def test_wsd_decays_by_its_own_horizon_whatever_the_steps_of_the_run_are() -> None:
    assert rates(85, overrides=[*WSD, "training.steps=85"]) == rates(85, overrides=WSD)


def test_a_decay_may_begin_right_after_the_warm_up() -> None:
    assert rates(10, 55, 100, overrides=[*WSD, "schedule.decay_share=0.9"]) == pytest.approx([1.0, 0.1**0.5, 0.1])


def test_the_group_brings_the_papers_share() -> None:
    assert load_run_config([*TINY, "schedule=wsd"]).schedule.decay_share == 0.1


@pytest.mark.parametrize(
    ("overrides", "cause", "cured"),
    [
        (["schedule=cosine", "schedule.decay_share=0.1"], "schedule.kind=wsd alone, not by cosine", "schedule=wsd"),
        (["schedule.kind=wsd"], "schedule.kind=wsd needs schedule.decay_share", "schedule=wsd"),
        (["schedule=wsd", "schedule.decay_share=0.95"], "a decay of 95 steps, but schedule.warmup_steps=10 leaves 90",
         "schedule.decay_share=0.9"),
        (["schedule=wsd", "schedule.decay_share=0"], "decay_share=0 is not above 0", "schedule.decay_share=0.1"),
        (["schedule=wsd", "schedule.final_fraction=0"], "never reaches 0", "schedule.final_fraction=0.01"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_with_its_cure(overrides: list[str], cause: str, cured: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*TINY, *overrides])
    assert cause in caught.value.cause
    load_run_config([*TINY, *overrides, cured])


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in SCHEDULE_KEYS.items() for key in keys])
def test_a_schedules_own_key_has_a_check_and_its_group_sets_it(kind: ScheduleKind, key: str) -> None:
    group = f"schedule={kind.value}"
    with pytest.raises(ConfigError, match=f"needs schedule.{key}") as caught:
        load_run_config([*TINY, f"schedule.kind={kind.value}"])
    assert f"choose {group}, which sets it" in caught.value.cure
    schedule = load_run_config([*TINY, group]).schedule
    assert schedule.kind is kind and getattr(schedule, key) is not None
    for value in ("-1", "nan"):
        with pytest.raises(ConfigError, match=f"schedule.{key}={value}"):
            load_run_config([*TINY, group, f"schedule.{key}={value}"])
