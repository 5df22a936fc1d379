"""The table of a mixture: a row and a bar for each source, phases below."""

from io import StringIO

from rich.console import Console

from gpt4moe.config.load import load_run_config
from gpt4moe.data.overview import overview
from gpt4moe.pages.mixture_table import mixture_table


def shown(*overrides: str) -> str:
    console = Console(file=StringIO(), width=160)
    for part in mixture_table(overview(load_run_config(["+experiment=gpt4", "run.name=t", *overrides]))):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_gpt4s_mixture_has_a_row_a_source_with_bars_in_proportion() -> None:
    lines = shown().splitlines()
    rows = {line.split()[1]: line for line in lines if line.startswith("│")}
    assert "planned, nothing is on disk" in lines[0]
    assert rows["common_crawl"].count("█") == rows["refined_web"].count("█") == 9
    assert rows["twitter"].count("█") == 1
    assert "2.5T" in rows["common_crawl"]
    assert "10 TB" in rows["common_crawl"]
    assert "400 GB" in rows["twitter"]
    assert "speculated" in rows["twitter"]
    assert "6.25T" in rows["all"]


def test_phases_follow_below() -> None:
    more = [f"++data.sources.{name}.max_epochs=9" for name in ("code", "textbooks")]
    text = shown("data.phases=[{from_tokens: 12e12, shares: {code: 1, textbooks: 3}}]", *more)
    assert "from sample 1,464,843,750: code 25.00%, textbooks 75.00%" in text
