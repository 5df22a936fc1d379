"""Prefetch: the batches of the next step are made in a thread while this step runs.

    take(n, following=m)   the batches of n, made before or now -> a thread begins those of m -> the step of n runs
    begin(n)               the same, of the first ones
    again(n)               the batches of n once more, made in the thread while the step of n runs

On a GPU they are made in pinned memory, so that Batch.to copies them while the host goes on.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gpt4moe.data.batch import Batch

Make = Callable[[int], list[Batch]]


class Prefetch:
    """Owns one thread, from the first `take` until `close`.

    It has no position of its own: what `take` returns depends on its argument alone. So a checkpoint stores the samples
    that steps have consumed, whatever the thread has begun since.

    Args:
        make: the batches of the step that follows `consumed_samples`. A pure function, called in the thread.
        device: that the batches are for.
    """

    def __init__(self, make: Make, device: torch.device):
        self.make = make
        self.device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples", initializer=self._start)
        self._begun: tuple[int, Future[list[Batch]]] | None = None

    def take(self, consumed_samples: int, *, following: int | None) -> list[Batch]:
        """The batches of the step that follows `consumed_samples`.

        Args:
            following: the consumed samples for which the next call will ask; the thread begins with them. If another
                number is asked for, they are dropped. None: this step is the last one.
        Raises: what `make` raises, the same error.
        """
        begun, self._begun = self._begun, None
        if begun is None or begun[0] != consumed_samples:
            begun = consumed_samples, self._thread.submit(self._make, consumed_samples)
        batches = begun[1].result()
        if following is not None:
            self.begin(following)
        return batches

    def begin(self, consumed_samples: int) -> None:
        """The thread begins with what the next `take` will ask for. Batches that it has begun before are dropped."""
        self._begun = consumed_samples, self._thread.submit(self._make, consumed_samples)

    def again(self, consumed_samples: int) -> Callable[[], list[Batch]]:
        """Begins to make batches that `take` has given before; what is returned waits for them. Raises: as `take`."""
        return self._thread.submit(self._make, consumed_samples).result

    def close(self) -> None:
        """Ends the thread. What it makes at the moment is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def _start(self) -> None:
        if self.device.type == "cuda":  # a thread's own current device is the first, where pinning would open a context
            torch.cuda.set_device(self.device)

    def _make(self, consumed_samples: int) -> list[Batch]:
        batches = self.make(consumed_samples)
        return [batch.pinned() for batch in batches] if self.device.type == "cuda" else batches
