"""The images of items, read, hashed and decoded in threads (Pillow frees the interpreter while it decodes), in order.

A bad image leaves its document: a clip with it, where it is a frame. What is bad is told, never stored.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from gpt4moe.data.pictures import ImageLimits, examine
from gpt4moe.errors import DataError
from gpt4moe.media.forms import Frames
from gpt4moe.media.inputs import BadItem, Item


@dataclass(frozen=True, slots=True)
class Picture:
    """A frame that is whole."""

    data: bytes
    size: tuple[int, int]
    """Width, height."""


@dataclass(frozen=True, slots=True)
class BadImage:
    where: str
    image: str
    reason: str


@dataclass(frozen=True, slots=True)
class Examined:
    """A document: its texts, its images that are whole, and the bad ones."""

    item: Item
    parts: list[str | list[Picture]] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)

    @property
    def images(self) -> list[list[Picture]]:
        return [part for part in self.parts if isinstance(part, list)]


def examined(found: Iterable[Item | BadItem], limits: ImageLimits, workers: int) -> Iterator[Examined | BadItem]:
    """The same for any number of workers."""
    waiting: deque[Future[Examined] | BadItem] = deque()
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="images") as pool:
        try:
            for one in found:
                waiting.append(one if isinstance(one, BadItem) else pool.submit(_examine, one, limits))
                if len(waiting) > 4 * workers:
                    yield _done(waiting.popleft())
            while waiting:
                yield _done(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _done(one: Future[Examined] | BadItem) -> Examined | BadItem:
    return one if isinstance(one, BadItem) else one.result()


def _examine(item: Item, limits: ImageLimits) -> Examined:
    found = Examined(item)
    for part in item.parts:
        if isinstance(part, str):
            found.parts.append(part)
            continue
        pictures = _pictures(part, item, limits, found.bad)
        if len(pictures) == len(part):
            found.parts.append(pictures)
    return found


def _pictures(names: Frames, item: Item, limits: ImageLimits, bad: list[BadImage]) -> list[Picture]:
    pictures = []
    for name in names:
        try:
            data = item.load(name)
            pictures.append(Picture(data, examine(data, limits)))
        except DataError as error:
            bad.append(BadImage(item.where, name, error.cause))
    return pictures
