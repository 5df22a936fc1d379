"""GPT-4's reported numbers: the page is what the code says, and the promises of it hold."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from gpt4moe.parallel.legality import layout_problems
from gpt4moe.planner.gpt4_claims import claims, claims_page
from gpt4moe.planner.gpt4_reported import Claim, ReportedRuns

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpt4-numbers.md"


@cache
def runs() -> ReportedRuns:
    return ReportedRuns.load()


@cache
def rows() -> dict[str, Claim]:
    return {row.claim: row for row in claims(runs())}


def test_the_page_is_what_the_planner_says() -> None:
    """`python tools/plan.py report=leak > docs/gpt4-numbers.md` writes it anew."""
    assert PAGE.read_text() == claims_page(list(rows().values()))


def test_davinci_is_served_on_a_layout_that_is_legal() -> None:
    """Its vocabulary is padded: 50,257 rows are odd, and tp 8 would be refused."""
    plan, served = runs().davinci, runs().davinci_served()
    assert layout_problems(plan.model, replace(plan.parallel, tp=8), plan.training, served.devices) == []


def test_16_experts_of_111b_make_1_8_trillion() -> None:
    assert rows()["parameters"].ours == "1.833T"
    assert rows()["an expert's MLP"].ours == "111.0B"
    assert rows()["earlier rumour: 8 experts of 220B"].ours == "1.760T, 220.0B"


def test_days_and_cost_of_the_report_are_a_tenth_below_the_interval_of_ours() -> None:
    """Our all-to-alls hide behind nothing, the busiest experts get 1.5 times the mean."""
    for claim, reported in (("days", 100), ("cost", 63)):
        ours, least, most = (float(number) for number in re.findall(r"[\d.]+", rows()[claim].ours))
        assert 0.9 * least < reported < least < ours < 1.25 * reported < most, claim


def test_each_row_has_its_own_name_and_counts_its_operations_in_one_way() -> None:
    """26.9% of the reported 6N and 28.2% with attention are one step; failures are apart from recomputation."""
    assert len(rows()) == len(claims(runs()))
    on_6n, whole = (float(rows()[name].ours.strip("%")) for name in ("utilisation", "utilisation, with attention"))
    flops = float(rows()["training compute, with attention"].ours)
    assert on_6n / whole == pytest.approx(2.15e25 / flops, abs=3e-3)
    assert rows()["days with recomputation that fits"].ours.startswith("146 (")
    stopped = rows()["days with failures too"].ours
    assert stopped.startswith("179 (") and ", of which 33 are failures'" in stopped
    assert rows()["cost on H100"].verdict.startswith("+1")


def test_what_does_not_follow_is_said() -> None:
    denied = [row.claim for row in rows().values() if "does not follow" in row.verdict]
    assert any("80 GB" in claim for claim in denied)
    assert any("Davinci" in claim for claim in denied)
    assert "ASSUMPTION" in rows()["... the utilisation that yields 3 x"].verdict


def verdict(claim: str, **cluster: float | None) -> str:
    """Of a claim where the devices were others."""
    gpt4 = runs().gpt4
    changed = replace(runs(), gpt4=replace(gpt4, cluster=replace(gpt4.cluster, **cluster)))
    return next(row.verdict for row in claims(changed) if row.claim == claim)


@pytest.mark.parametrize(
    ("claim", "before", "change", "after"),
    [
        ("tp 8 x pp 15, ZeRO-1, on 80 GB", "does not follow", {"memory_bytes": 200e9}, "follows"),
        ("... with recomputation", "follows", {"memory_bytes": 70e9}, "does not follow"),
        ("utilisation, with attention", "-11.9% outside", {"fabric_bytes_per_second": 5e9}, "-40.9% outside"),
        ("utilisation", "-16.1% outside", {"fabric_bytes_per_second": 100e9}, "-8.2% outside"),
        ("utilisation, with attention, experts balanced", "outside", {"fabric_bytes_per_second": 12e9}, "within"),
        ("days", "+19.0% outside", {"fabric_bytes_per_second": 100e9}, "+8.7% outside"),
        ("cost", "+24.4%", {"usd_per_hour": 2.2}, "+148.8%"),
        ("days with failures too", "+79.0%", {"hours_between_failures": 1e8}, "+46.5%"),
    ],
)
def test_a_verdict_comes_from_the_numbers(claim: str, before: str, change: dict[str, float], after: str) -> None:
    assert before in verdict(claim) and after not in verdict(claim)
    assert after in verdict(claim, **change)


def test_a_wrong_model_is_told_from_the_reported_one() -> None:
    gpt4 = runs().gpt4
    smaller = replace(runs(), gpt4=replace(gpt4, model=replace(gpt4.model, hidden_size=9216)))
    assert float(next(row.verdict for row in claims(smaller) if row.claim == "parameters").strip("%")) < -10
