"""GPT-4's reported numbers: the page is what the code says, and the promises of it hold."""

from functools import cache
from pathlib import Path

from gpt4moe.planner.answer import leak_rows
from gpt4moe.planner.leak import Claim, leak_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpt4-numbers.md"


@cache
def rows() -> dict[str, Claim]:
    return {row.claim: row for row in leak_rows()}


def test_the_page_is_what_the_planner_says() -> None:
    """`python tools/plan.py report=leak > docs/gpt4-numbers.md` writes it anew."""
    assert PAGE.read_text() == leak_page(list(rows().values()))


def test_16_experts_of_111b_make_1_8_trillion() -> None:
    assert rows()["parameters"].ours == "1.833T"
    assert rows()["an expert's MLP"].ours == "111.0B"
    assert rows()["earlier rumour: 8 experts of 220B"].ours == "1.760T, 220.0B"


def test_days_and_cost_come_within_five_percent_of_the_report() -> None:
    assert 90 <= float(rows()["days"].ours) <= 100
    assert 0.95 < float(rows()["cost"].ours.strip("$M")) / 63 < 1.05


def test_what_does_not_follow_is_said() -> None:
    denied = [row.claim for row in rows().values() if "does not follow" in row.verdict]
    assert any("80 GB" in claim for claim in denied)
    assert any("Davinci" in claim for claim in denied)
    assert "ASSUMPTION" in rows()["... the utilisation that yields 3 x"].verdict
