"""The order of callbacks follows from what each needs and gives; a list that cannot work is refused."""

from itertools import permutations
from pathlib import Path

import pytest

from gpt4moe.resilience.signals import SignalNotes
from gpt4moe.training.build import build_callbacks
from gpt4moe.training.callback import Callback, Gives, check_order
from gpt4moe.training.callbacks.events import Events


def own_callbacks() -> list[Callback]:
    return build_callbacks(Events(), SignalNotes(), lambda folder: folder)


def place(callbacks: list[Callback], name: str) -> int:
    return [type(callback).__name__ for callback in callbacks].index(name)


def test_a_run_has_an_order_that_works() -> None:
    check_order(own_callbacks())


@pytest.mark.parametrize(
    ("first", "second", "lost"),
    [
        ("Events", "WireBytes", None),  # neither uses the other
        ("WireBytes", "Replicas", "step_traffic"),  # its own traffic would count as the step's
        ("Agreement", "Tracking", "record"),  # metrics.jsonl would lack the peak memory
        ("Evaluation", "Tracking", "record"),
        ("RoutingRecord", "Evaluation", "own_routing"),  # held-out samples would count
        ("Tracking", "Alerts", "console"),
        ("Tracking", "Checkpoints", "metrics_log"),  # a checkpoint could be ahead of metrics.jsonl
        ("Replicas", "Checkpoints", "replica_check"),  # unequal copies would be saved
        ("Checkpoints", "Report", "checkpoint"),
        ("Events", "Report", "event_log"),
    ],
)
def test_two_that_depend_on_each_other_cannot_change_places(first: str, second: str, lost: str | None) -> None:
    callbacks = own_callbacks()
    one, other = place(callbacks, first), place(callbacks, second)
    callbacks[one], callbacks[other] = callbacks[other], callbacks[one]
    if lost is None:
        check_order(callbacks)
        return
    with pytest.raises(ValueError, match="needs"):
        check_order(callbacks)
    assert Gives[lost] in type(own_callbacks()[other]).needs & type(own_callbacks()[one]).gives


def test_every_order_that_breaks_a_need_is_refused_and_no_other() -> None:
    class Writer(Callback):
        gives = frozenset({Gives.record})

    class Reader(Callback):
        needs = frozenset({Gives.record})

    for callbacks in permutations([Writer(), Writer(), Reader()]):
        if isinstance(callbacks[-1], Reader):
            check_order(callbacks)
        else:
            with pytest.raises(ValueError, match=r"Reader needs record .* Writer behind it gives"):
                check_order(callbacks)
    with pytest.raises(ValueError, match="no callback gives"):
        check_order([Reader()])


def test_everything_needed_is_given_by_somebody_and_everything_given_is_needed(tmp_path: Path) -> None:
    callbacks = own_callbacks()
    needed = frozenset().union(*(callback.needs for callback in callbacks))
    assert needed == frozenset().union(*(callback.gives for callback in callbacks)) == frozenset(Gives)
