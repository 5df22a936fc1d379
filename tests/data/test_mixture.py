"""The n-th sample of a mixture: exact shares, a pure function of (seed, n), each source in its own order."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.data.mixture import Mixture, Phase, PhasedMixture, largest_remainder
from gpt4moe.errors import DataError

SOURCES = {"code": 37, "prose": 1100, "web": 5000}
WEIGHTS = {"code": 0.1, "prose": 0.2334, "web": 0.6666}


def test_after_each_block_of_1000_every_source_has_had_its_share() -> None:
    mixture = Mixture(SOURCES, WEIGHTS, seed=7)
    sources = [mixture.place(n)[0] for n in range(5000)]
    assert [Counter(sources[:end])["prose"] for end in range(1000, 6000, 1000)] == [233, 467, 700, 934, 1167]
    assert [Counter(sources[:end])["code"] for end in range(1000, 6000, 1000)] == [100, 200, 300, 400, 500]


def test_over_a_long_run_the_shares_are_exact() -> None:
    mixture = Mixture(SOURCES, WEIGHTS, seed=7)
    assert mixture.consumed(10**10) == {"code": 10**9, "prose": 2_334_000_000, "web": 6_666_000_000}


def test_blocks_differ_in_order() -> None:
    mixture = Mixture(SOURCES, WEIGHTS, seed=7)
    first, second = ([mixture.place(block * 1000 + n)[0] for n in range(1000)] for block in range(2))
    assert first != second


def test_a_draw_does_not_depend_on_what_was_asked_before() -> None:
    forwards = [Mixture(SOURCES, WEIGHTS, seed=7).place(n) for n in (0, 1, 999, 1000, 54321)]
    mixture = Mixture(SOURCES, WEIGHTS, seed=7)
    backwards = [mixture.place(n) for n in (54321, 1000, 999, 1, 0)]
    assert forwards == backwards[::-1]


def test_another_seed_gives_another_order() -> None:
    orders = [[Mixture(SOURCES, WEIGHTS, seed=seed).place(n)[0] for n in range(1000)] for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_the_order_never_changes_between_versions() -> None:
    mixture = Mixture(SOURCES, WEIGHTS, seed=1234)
    assert "".join(mixture.place(n)[0][0] for n in range(20)) == "cpcwwcpcwwwpwpwpwwpw"


def test_a_source_is_read_in_order_and_starts_its_next_epoch_at_its_end() -> None:
    mixture = PhasedMixture(SOURCES, [Phase(0, WEIGHTS)], seed=7)
    code = [draw for draw in map(mixture.draw, range(2000)) if draw.source == "code"]
    assert [(draw.epoch, draw.position) for draw in code] == [divmod(k, 37) for k in range(200)]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 3500), seed=st.integers(0, 99))
def test_consumed_counts_what_was_drawn(n: int, seed: int) -> None:
    mixture = Mixture(SOURCES, WEIGHTS, seed)
    drawn = Counter(mixture.place(i)[0] for i in range(n))
    assert mixture.consumed(n) == {name: drawn[name] for name in SOURCES}


def test_a_source_of_weight_zero_never_appears() -> None:
    mixture = Mixture(SOURCES, {"code": 0.0, "web": 3.0}, seed=7)
    assert mixture.consumed(5000) == {"web": 5000}


def test_a_small_share_gets_a_larger_block_rather_than_nothing() -> None:
    mixture = Mixture(SOURCES, {"code": 0.0002, "web": 0.9998}, seed=7)
    assert mixture.consumed(1_000_000)["code"] == 200


def test_a_weight_without_source_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(DataError, match="books") as refusal:
        Mixture(SOURCES, {"books": 1.0}, seed=7)
    assert "code, prose, web" in refusal.value.cure


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9), st.integers(0, 5000))
def test_largest_remainder_is_within_one_of_the_share_and_sums_up(raw: list[float], total: int) -> None:
    shares = [value / sum(raw) for value in raw]
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))


PHASES = [Phase(0, WEIGHTS), Phase(2500, {"web": 0.5, "books": 0.5}), Phase(4000, {"code": 1.0, "web": 1.0})]
MORE = SOURCES | {"books": 90}


def test_a_phase_changes_no_earlier_sample_and_each_source_goes_on_where_it_was() -> None:
    mixture = PhasedMixture(MORE, PHASES, seed=7)
    before = PhasedMixture(SOURCES, PHASES[:1], seed=7)
    assert [mixture.draw(n) for n in range(2500)] == [before.draw(n) for n in range(2500)]
    position: Counter[str] = Counter()
    for draw in map(mixture.draw, range(6000)):
        assert (draw.epoch, draw.position) == divmod(position[draw.source], MORE[draw.source])
        position[draw.source] += 1
    assert mixture.consumed(6000) == dict(position)
    assert Counter(mixture.draw(n).source for n in range(4000, 6000)) == {"code": 1000, "web": 1000}


@pytest.mark.parametrize("n", [0, 1, 2499, 2500, 2501, 3999, 4000, 5123])
def test_consumed_counts_across_phases(n: int) -> None:
    mixture = PhasedMixture(MORE, PHASES, seed=7)
    drawn = Counter(mixture.draw(i).source for i in range(n))
    assert mixture.consumed(n) == {name: drawn[name] for name in sorted(MORE)}
