"""Samples that a run went back from: which ones its steps read instead, whatever it went back from before."""

import json
from math import inf
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.config.typed import sealed
from gpt4moe.data.loader import Data, SampleStream
from gpt4moe.data.passed_over import GONE_BACK_FILE, NOTHING, PassedOver, read_gone_back
from gpt4moe.data.samples import TokenSample
from gpt4moe.errors import DataError


@settings(max_examples=200, deadline=None)
@given(times=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=5))
def test_steps_read_every_sample_in_order_that_is_in_no_window(times: list[tuple[int, int]]) -> None:
    over, dropped, farthest = NOTHING, set[int](), 0
    for consumed, further in times:  # back to so many consumed samples, from a point beyond all before
        first = over.position(consumed)
        farthest = max(first, farthest) + further
        over, dropped = over.and_from(first, farthest), dropped | set(range(first, farthest))
    read = [sample for sample in range(300) if sample not in dropped][:60]
    assert [over.position(consumed) for consumed in range(60)] == read
    assert PassedOver.of(json.loads(json.dumps(over.as_lists()))) == over
    assert sum(samples for _, samples in over.windows) == len(dropped)
    for place in range(0, 60, 7):  # of two sources, the one with the even samples and the one with the odd
        counts = Data(
            train=SampleStream(_Halves(), 64), validation=SampleStream(_Halves(), 64), identity={}, tokenizer=None,
            source_names=["even", "odd"],
        ).consumed_per_source(place, over)  # fmt: skip
        assert counts == {"even": sum(n % 2 == 0 for n in read[:place]), "odd": sum(n % 2 for n in read[:place])}


class _Halves:
    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        raise NotImplementedError

    def consumed(self, n: int) -> dict[str, int]:
        return {"even": (n + 1) // 2, "odd": n // 2}


TIME = {"step": 7, "to_step": 4, "newest": 4, "samples": 8, "cause": "nan", "time": 1.5}


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", '{"passed_over": [], "times": []}',
        *(sealed(json.dumps(record)) for record in (
            {"passed_over": [[1]], "times": []}, {"passed_over": 3, "times": []},
            {"passed_over": [[inf, 1]], "times": []},
            {"passed_over": [[5, 936], [3, -7]], "times": []}, {"passed_over": [], "times": [{}]},
            {"passed_over": [], "times": [{**TIME, "to_step": 7}]}, {"passed_over": [], "times": [TIME], "more": 1},
        )),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    assert read_gone_back(tmp_path) is None
    (tmp_path / GONE_BACK_FILE).write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        read_gone_back(tmp_path)
    (tmp_path / GONE_BACK_FILE).write_text(sealed(json.dumps({"passed_over": [[3, 8]], "times": [TIME]})))
    found = read_gone_back(tmp_path)
    assert found is not None and found[1][0].to_step == 4
