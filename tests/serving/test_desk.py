"""The queue: bounded, emptied by take, closed for good."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from gpt4moe.inference.pictures import picture
from gpt4moe.inference.requests import Completion
from gpt4moe.inference.sampling import Sampling
from gpt4moe.serving import desk as desk_module
from gpt4moe.serving.desk import Closed, Desk, Event, Full, Wanted

ONE = Wanted(prompt=[1], max_tokens=2, sampling=Sampling())


def test_the_queue_is_bounded_and_a_client_that_leaves_makes_room() -> None:
    async def story() -> None:
        desk, events = Desk(3), asyncio.Queue[Event]()
        first = desk.submit([ONE, ONE], events)
        with pytest.raises(Full):
            desk.submit([ONE, ONE], events)
        assert len(desk.take(0).new) == 2 and not desk.take(0)
        second = desk.submit([ONE], events)
        desk.leave(second)  # it waited
        assert not desk.waiting
        desk.leave(first)  # it runs
        assert desk.take(0).left == [0, 1] and not desk.waiting

    asyncio.run(story())


def test_pixels_of_texts_that_run_or_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeing(value: int) -> Wanted:
        return replace(ONE, images=(picture(np.full((1, 4, 4, 3), value, dtype=np.uint8), 0),))

    monkeypatch.setattr(desk_module, "MOST_IMAGE_BYTES", 100)  # two images of 48 bytes

    async def story() -> None:
        desk, events = Desk(20), asyncio.Queue[Event]()
        first = desk.submit([seeing(1)] * 5, events)  # one prompt's, which share it
        desk.take(0)
        second = desk.submit([seeing(2)], events)
        with pytest.raises(Full, match="full of images"):
            desk.submit([seeing(3)], events)
        desk.submit([ONE], events)
        desk.leave(second)  # it waited
        third = desk.submit([seeing(3)], events)
        for number in range(5):
            desk.done(Completion(number=number, tokens=[], logprobs=[], finish_reason="stop"))
        desk.leave(third)
        desk.submit([replace(ONE, images=(*seeing(4).images, *seeing(5).images, *seeing(6).images))], events)  # alone
        assert first.image_bytes == 48

    asyncio.run(story())


def test_a_closed_queue_tells_those_who_wait_and_takes_no_more() -> None:
    async def story() -> Event:
        desk, events = Desk(3), asyncio.Queue[Event]()
        desk.submit([ONE], events)
        desk.take(0)
        desk.close("ending")
        with pytest.raises(Closed):
            desk.submit([ONE], events)
        news = desk.take(0)
        assert news.is_closing and news.left == [0]
        return await events.get()

    assert asyncio.run(story()).failure == "ending"
