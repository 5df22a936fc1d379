"""How fast steps go by, and when the last one will be done: evaluations, checkpoints and all."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_STEPS = 50


class Pace:
    """When the last steps of one start were done.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS)

    def mark(self, step: int) -> float:
        """Step `step` is done now; what the clock says."""
        now = self._clock()
        self._marks.append((now, step))
        return now

    def eta_seconds(self, total_steps: int) -> float | None:
        """Seconds to the end of step `total_steps` at the pace of the last steps; None before there is one."""
        if len(self._marks) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        return (last_time - first_time) / (last_step - first_step) * (total_steps - last_step)
