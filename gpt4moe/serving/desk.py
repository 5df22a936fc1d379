"""The queue between the HTTP thread and the thread that generates, on rank 0.

    HTTP thread: submit --> waiting --take, between two steps--> all ranks
    generating thread: grown, done, close --> events of each HTTP request's queue

It is bounded: what is in flight or waits is at most `max_texts` texts, and more are refused at once. So are images
whose pixels would be more than MOST_IMAGE_BYTES: every rank holds those of all texts that run or wait.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpt4moe.inference.batch import Row
from gpt4moe.inference.pictures import Picture
from gpt4moe.inference.requests import Completion
from gpt4moe.inference.sampling import Sampling

MOST_IMAGE_BYTES = 256 * 2**20
"""Of pixels at the encoder's size, in memory on each rank: 600 images of 384 x 384."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One text, as it travels to all ranks."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    sample: int = 0
    stops: tuple[str, ...] = ()
    images: tuple[Picture, ...] = ()
    """Hashed once, where they were read; they travel with their pixels."""


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a text of an HTTP request."""

    index: int
    """Of the text in its request."""
    token: int | None = None
    logprob: float = 0.0
    done: Completion | None = None
    failure: str | None = None


@dataclass(slots=True)
class Job:
    """One HTTP request: some texts, and the queue that its handler reads."""

    wanted: Sequence[Wanted]
    put: Callable[[Event], None]
    """Safe to call from the generating thread."""

    @property
    def image_bytes(self) -> int:
        """Of its texts' pixels; texts of one prompt share them."""
        images = {image.digest: image for wanted in self.wanted for image in wanted.images}
        return sum(image.read().nbytes for image in images.values())


@dataclass(slots=True)
class News:
    """What changed since the last step; equal on every rank after it is sent."""

    new: list[Wanted] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    """Numbers of texts that nobody waits for any more."""
    is_closing: bool = False

    def __bool__(self) -> bool:
        return bool(self.new or self.left or self.is_closing)


class Full(Exception):
    """The queue has no room for these texts now; it says for which."""


class Closed(Exception):
    """The server is ending."""


class Desk:
    """Args: max_texts: that run or wait at once."""

    def __init__(self, max_texts: int):
        self.max_texts = max_texts
        self.changed = threading.Condition()
        self.waiting: list[tuple[Job, int]] = []
        self.open: dict[int, tuple[Job, int]] = {}
        """By the number that Generator gives a text: the order of taking."""
        self.left: list[int] = []
        self.num_taken = 0
        self.is_closing = False

    def submit(self, wanted: Sequence[Wanted], events: "asyncio.Queue[Event]") -> Job:
        """From the event loop's thread. Raises: Full; Closed."""
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(wanted, put)
        with self.changed:
            self.require_room(len(wanted))
            held = sum(one.image_bytes for one in {id(one): one for one, _ in self._unfinished()}.values())
            # A request alone is taken whatever it has: its images are bounded where they are read.
            if held and held + job.image_bytes > MOST_IMAGE_BYTES:
                raise Full("The queue is full of images.")
            self.waiting += [(job, index) for index in range(len(wanted))]
            self.changed.notify()
        return job

    def require_room(self, num_texts: int) -> None:
        """Raises: Full when there is none for so many texts now; Closed."""
        with self.changed:
            if self.is_closing:
                raise Closed
            if len(self._unfinished()) + num_texts > self.max_texts:
                raise Full("The queue is full.")

    def _unfinished(self) -> list[tuple[Job, int]]:
        return [*self.waiting, *self.open.values()]

    def leave(self, job: Job) -> None:
        """The client of a job has gone."""
        with self.changed:
            self.waiting = [(one, index) for one, index in self.waiting if one is not job]
            self.left += [number for number, (one, _) in self.open.items() if one is job]

    def take(self, wait_seconds: float) -> News:
        """What is new; waits for it at most so long."""
        with self.changed:
            if wait_seconds:
                self.changed.wait_for(lambda: self.waiting or self.left or self.is_closing, timeout=wait_seconds)
            news = News(left=self.left, is_closing=self.is_closing)
            self.left = []
            if self.is_closing:
                return news
            for job, index in self.waiting:
                news.new.append(job.wanted[index])
                self.open[self.num_taken] = (job, index)
                self.num_taken += 1
            self.waiting = []
            return news

    def grown(self, row: Row) -> None:
        job, index = self.open[row.number]
        job.put(Event(index, token=row.tokens[-1], logprob=row.logprobs[-1]))

    def done(self, completion: Completion) -> None:
        with self.changed:
            job, index = self.open.pop(completion.number)
        job.put(Event(index, done=completion))

    def close(self, why: str) -> None:
        """No text is taken any more; every client that waits is told why."""
        with self.changed:
            self.is_closing = True
            jobs = {id(job): job for job, _ in self._unfinished()}
            self.waiting = []
            self.left += list(self.open)
            self.changed.notify()
        for job in jobs.values():
            job.put(Event(0, failure=why))
