"""Tasks on several processes: results in the order of the tasks, progress as bytes, no process left behind.

A task is a function of this room and its arguments. Each process opens a Kitchen once. With one process everything runs
in this one.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from gpt4moe.corpus.piece import Kitchen, Recipe
from gpt4moe.corpus.records import Advance
from gpt4moe.errors import DataError

Task = Callable[..., Any]
"""Called with a Kitchen, an Advance, and the arguments of the task. Its result is pickled by the standard library."""
_HERE: dict[str, Any] = {}
"""Of a worker process: its kitchen, and the counter of bytes."""
_WAIT_SECONDS = 0.2


class Workers:
    """Processes that wait for tasks while it is open."""

    def __init__(self, processes: int, recipe: Recipe):
        self.processes, self.recipe = processes, recipe
        self.pool: ProcessPoolExecutor | None = None
        self.kitchen: Kitchen | None = None

    def __enter__(self) -> "Workers":
        if self.processes > 1:
            context = multiprocessing.get_context("spawn")
            self.done, self.is_over = context.Value("q", 0), context.Value("b", 0)
            self.reported = 0
            given = (self.recipe, self.done, self.is_over, os.getpid())
            self.pool = ProcessPoolExecutor(self.processes, context, initializer=_open, initargs=given)
        else:
            self.kitchen = Kitchen(self.recipe)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            if kind is KeyboardInterrupt:
                self.is_over.value = 1  # else a person would wait for the pieces that are under way
            self.pool.shutdown(cancel_futures=True)

    def map(self, task: Task, arguments: Iterable[tuple[Any, ...]], advance: Advance) -> Iterator[Any]:
        """Results in the order of the arguments; a few tasks are under way at once.

        Args:
            advance: called in this process with the bytes that were just done, in whichever process.
        Raises: DataError of the first task that fails, and when a process was killed.
        """
        if self.pool is None:
            yield from (task(self.kitchen, advance, *given) for given in arguments)
            return
        waiting: deque[Future[Any]] = deque()
        for given in arguments:
            try:
                waiting.append(self.pool.submit(_run, task, given))
            except BrokenProcessPool as error:
                raise _killed() from error
            if len(waiting) >= 3 * self.processes:
                yield self._result(waiting.popleft(), advance)
        while waiting:
            yield self._result(waiting.popleft(), advance)

    def _result(self, future: "Future[Any]", advance: Advance) -> Any:
        while True:
            try:
                result = future.result(timeout=_WAIT_SECONDS)
            except NotYet:
                self._report(advance)
                continue
            except BrokenProcessPool as error:
                raise _killed() from error
            self._report(advance)
            return result

    def _report(self, advance: Advance) -> None:
        done = self.done.value
        advance(done - self.reported)
        self.reported = done


def _killed() -> DataError:
    return DataError(
        "A worker process was killed, perhaps because memory ran out.",
        "Run the same command again, with fewer --processes: what is finished is kept.",
    )


def _open(recipe: Recipe, done: Any, is_over: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    # The library's own threads would only take each other's cores: there is a process for each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with, args=(parent, is_over), daemon=True).start()
    _HERE.update(kitchen=Kitchen(recipe), done=done)


def _leave_with(parent: int, is_over: Any) -> None:
    """Ends this process when its parent was killed, so that none goes on writing beside the next command."""
    while os.getppid() == parent and not is_over.value:
        time.sleep(_WAIT_SECONDS)
    os._exit(1)


def _run(task: Task, given: tuple[Any, ...]) -> Any:
    """The result. Raises: DataError."""
    done = _HERE["done"]

    def advance(amount: int) -> None:
        with done.get_lock():
            done.value += amount

    try:
        return task(_HERE["kitchen"], advance, *given)
    except OSError as error:
        cause = f"{error.filename or 'A file'}: {error.strerror}."
        raise DataError(cause, "Make room, and run the same command again.") from error
