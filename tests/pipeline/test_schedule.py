"""The pipeline schedule as data; tests/distributed/test_schedule.py holds it against the order that Megatron ran."""

import pytest

from gpt4moe.errors import LayoutError
from gpt4moe.pipeline.message_check import message_problems
from gpt4moe.pipeline.messages import Exchange, Program, programs
from gpt4moe.pipeline.schedule import Pass, Slot, bubble_share, peak_live, schedule, simulate

# (pp, vpp, micro-batches): also fewer micro-batches than stages, and no multiple of them.
SHAPES = [
    (1, 1, 3), (2, 1, 1), (2, 1, 3), (4, 1, 2), (4, 1, 7), (2, 2, 2), (2, 2, 6), (3, 2, 6), (4, 2, 4), (4, 3, 12),
]  # fmt: skip


def words(slots: list[Slot]) -> str:
    """F or B, chunk, micro-batch: F00 B00."""
    return " ".join(f"{slot.direction.value[0].upper()}{slot.chunk}{slot.micro_batch}" for slot in slots)


def test_1f1b_warms_up_by_its_distance_to_the_last_stage() -> None:
    table = schedule(pp=2, micro_batches=3)
    assert words(table[0]) == "F00 F01 B00 F02 B01 B02"
    assert words(table[1]) == "F00 B00 F01 B01 F02 B02"


def test_interleaving_walks_a_group_of_pp_micro_batches_through_all_chunks() -> None:
    table = schedule(pp=2, vpp=2, micro_batches=4)
    assert words(table[1]) == "F00 F01 F10 B10 F11 B11 F02 B00 F03 B01 F12 B12 F13 B13 B02 B03"


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), SHAPES)
def test_every_chunk_does_every_micro_batch_once_forward_then_once_backward(
    pp: int, vpp: int, micro_batches: int
) -> None:
    for slots in schedule(pp=pp, vpp=vpp, micro_batches=micro_batches):
        assert len(slots) == len(set(slots)) == 2 * vpp * micro_batches
        for slot in slots:
            if slot.direction is Pass.backward:
                forward = Slot(Pass.forward, slot.chunk, slot.micro_batch)
                assert slots.index(forward) < slots.index(slot)


@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), SHAPES)
def test_bubble_of_equal_stages_is_the_formula_of_the_paper(
    pp: int, vpp: int, micro_batches: int, backward: float
) -> None:
    timeline = simulate(schedule(pp=pp, vpp=vpp, micro_batches=micro_batches), backward=backward)
    assert bubble_share(timeline) == pytest.approx((pp - 1) / (vpp * micro_batches))


def test_a_slow_stage_sets_the_pace_of_a_long_step() -> None:
    timeline = simulate(schedule(pp=3, micro_batches=100), forward=[1, 1.5, 1], backward=[2, 3, 2])
    # Before its first forward, 100 micro-batches, the wait for its first gradient, after its last backward.
    assert timeline.total == pytest.approx(1 + 100 * 4.5 + 1.5 + 2)


def test_communication_between_ranks_delays_and_inside_a_rank_does_not() -> None:
    one = simulate(schedule(pp=1, micro_batches=2), communication=5)
    two = simulate(schedule(pp=2, micro_batches=1), communication=5)
    assert one.total == 6
    assert two.total == 2 * 3 + 2 * 5


def test_live_activations_fall_with_the_rank_and_stop_at_the_micro_batches() -> None:
    assert peak_live(schedule(pp=4, micro_batches=8)) == [4, 3, 2, 1]
    assert peak_live(schedule(pp=4, micro_batches=2)) == [2, 2, 2, 1]
    # arXiv:2104.04473 holds pp (1 + (pp - 1) / (pp v)) v chunks at most; Megatron's first rank holds that.
    assert peak_live(schedule(pp=4, vpp=2, micro_batches=16))[0] == 11
    assert peak_live(schedule(pp=1, micro_batches=8)) == [1]


def test_live_activations_are_weighed_by_stage() -> None:
    assert peak_live(schedule(pp=2, micro_batches=4), [10, 7]) == [20, 7]


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"pp": 1, "vpp": 2, "micro_batches": 4}, "parallel.pp=1"),
        ({"pp": 4, "vpp": 2, "micro_batches": 6}, "6 micro-batches in groups of 4"),
        ({"pp": 2, "vpp": 2, "micro_batches": 1}, "1 micro-batches in groups of 2"),
        ({"pp": 2, "micro_batches": 0}, "1 or more"),
    ],
)
def test_a_schedule_that_megatron_refuses_is_refused(degrees: dict[str, int], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        schedule(**degrees)


def test_a_table_that_waits_for_itself_is_refused() -> None:
    table = schedule(pp=2, micro_batches=2)
    table[1].insert(0, table[1].pop(1))  # the gradient before the activation
    with pytest.raises(LayoutError, match="waits for itself"):
        simulate(table)


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), SHAPES)
def test_every_send_meets_its_receive(pp: int, vpp: int, micro_batches: int) -> None:
    ranks = programs(pp=pp, vpp=vpp, micro_batches=micro_batches)
    assert message_problems(ranks, vpp) == []
    table = schedule(pp=pp, vpp=vpp, micro_batches=micro_batches)
    assert [[item for item in program if isinstance(item, Slot)] for program in ranks] == table


@pytest.mark.parametrize(("pp", "micro_batches"), [(pp, count) for pp, vpp, count in SHAPES if vpp == 1])
def test_every_batched_send_meets_its_receive_without_interleaving(pp: int, micro_batches: int) -> None:
    """As GPUs run it."""
    assert message_problems(programs(pp=pp, micro_batches=micro_batches, batched=True)) == []


def test_batched_messages_between_two_interleaved_stages_cross() -> None:
    # What bit on gloo: a wrong loss without an error. Previous and next stage are one rank.
    ranks = programs(pp=2, vpp=2, micro_batches=4, batched=True)
    assert "messages cross: rank 0 sends the gradient" in message_problems(ranks, 2)[0]
    assert message_problems(programs(pp=4, vpp=2, micro_batches=8, batched=True), 2) == []


def exchanges(program: Program) -> list[int]:
    return [place for place, item in enumerate(program) if isinstance(item, Exchange)]


def test_two_swapped_posts_are_found() -> None:
    ranks = programs(pp=2, vpp=2, micro_batches=4)
    places = [place for place in exchanges(ranks[0]) if ranks[0][place].posts[0].is_send]
    ranks[0][places[0]], ranks[0][places[1]] = ranks[0][places[1]], ranks[0][places[0]]
    problems = message_problems(ranks, 2)
    assert problems[0] == (
        "messages cross: rank 0 sends the activation for stage 1 of micro-batch 1 where rank 1 receives the activation "
        "for stage 1 of micro-batch 0"
    )


def test_a_lost_message_is_found() -> None:
    ranks = programs(pp=4, micro_batches=4)
    del ranks[0][exchanges(ranks[0])[0]]
    problems = message_problems(ranks)
    assert any("messages cross: rank 0 sends the activation for stage 1 of micro-batch 1" in line for line in problems)
    assert any("waits for ever" in line for line in problems)
