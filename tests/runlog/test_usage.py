"""The time that is left, where steps differ in size."""

from gpt4moe.config.step_sizes import LengthLevelConfig, StepSizes
from gpt4moe.runlog.usage import Pace


def test_the_time_left_counts_tokens_so_that_longer_steps_to_come_count_for_what_they_are() -> None:
    sizes = StepSizes([], 4, 32, [LengthLevelConfig(seq_length=8, until_step=10)])
    now = [0.0]
    pace = Pace(lambda: now[0], sizes.tokens)
    assert pace.mark(0) == 0.0
    now[0] = 5.0
    pace.mark(5)  # a second each
    assert pace.eta_seconds(10) == 5
    assert pace.eta_seconds(12) == 5 + 2 * 4  # a step of four times the tokens
    assert Pace(lambda: 0.0).eta_seconds(10) is None
