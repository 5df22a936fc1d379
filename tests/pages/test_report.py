"""report.html is one whole file that needs nothing else, shows the numbers, and lets no text break out."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.pages.report import ReportData, RunStart, Sample, write_report
from gpt4moe.planner.pipeline_plan import run_pipeline
from gpt4moe.runlog.goodput import CAUSES, Goodput
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_columns import MetricColumns
from tests.runlog.synthetic import falling_loss, uneven_load

VOID = {"meta", "link", "br", "img"}
HOSTILE = '</pre><script>alert("x")</script><img src=https://evil.example/a.png>&amp;\x00\ud800'


class Page(HTMLParser):
    """Every element with its attributes and every text; a tag closed out of order is an error."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def report(tmp_path: Path, records: list[Record] | None = None, **changes: object) -> Page:
    values: dict[str, object] = {
        "run_name": "tiny <1>", "layout": "tp=2 pp=2 ep=2, 4 ranks", "resolved_config": "run:\n  name: tiny\n",
        "columns": MetricColumns(falling_loss(40) if records is None else records),
        "checkpoint_path": "runs/tiny/checkpoints/x",
    }  # fmt: skip
    write_report(tmp_path / "report.html", ReportData(**(values | changes)))
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def full(tmp_path: Path, **changes: object) -> Page:
    starts = [RunStart(first_step=1, when="10:00", layout="a"), RunStart(first_step=21, when="10:05", layout="b")]
    values: dict[str, object] = {
        "unigram_entropy": 6.0, "bigram_entropy": 3.0, "expert_load": uneven_load(num_experts=8), "starts": starts,
        "samples": [Sample(prompt="def f(", text="x): return 1")], "num_parameters": 21_300_000,
    }  # fmt: skip
    return report(tmp_path, **(values | changes))


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = full(tmp_path, samples=[Sample(prompt="see https://example.org", text=HOSTILE)])
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "image", "use", "object", "embed"}
    assert not [attrs for _, attrs in page.elements if set(attrs) & {"src", "href", "xlink:href", "srcset"}]
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    policies = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in str(policies[0])


def test_the_duration_is_the_wall_time_of_the_account(tmp_path: Path) -> None:
    account = Goodput(wall_seconds=3725.0, seconds=dict.fromkeys(CAUSES, 0.0), attempts=[])
    assert "1:02:05h:mm:ss of wall time" in full(tmp_path, account=account).text
    assert "0:00:20h:mm:ss of steps" in full(tmp_path).text, "of a run without events"


def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    records = falling_loss(4)
    for record, rank, ratio in zip(records, (3, 1, 3), (1.4, 1.1, 1.8), strict=False):
        record |= {"busiest_rank": rank, "busiest_rank_ratio": ratio}
    wanted = "Slowest rank31.60 times the work of the others of its stage, in 2 of 3 readings"
    assert wanted in report(tmp_path, records).text
    assert "Slowest rank" not in report(tmp_path).text


@pytest.mark.parametrize(
    "place", ["run_name", "layout", "resolved_config", "checkpoint_path", "prompt", "text", "note"]
)
def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path, place: str) -> None:
    if place in ("prompt", "text"):
        page = full(tmp_path, samples=[Sample(**({"prompt": "p", "text": "t"} | {place: HOSTILE}))])
    elif place == "note":
        page = full(tmp_path, starts=[RunStart(first_step=1, when="w", layout="l", note=HOSTILE)])
    else:
        page = full(tmp_path, **{place: HOSTILE})
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert '</pre><script>alert("x")</script>' in page.text


def test_the_numbers_are_on_the_page(tmp_path: Path) -> None:
    text = full(tmp_path).text
    last = falling_loss(40)[-1]
    for wanted in (f"{last['loss']:.3f}", f"{last['eval_loss']:.3f}", "163,840", "8.19k/s", "0:00:20", "21.3M"):
        assert wanted in text, wanted
    assert "tp=2 pp=2 ep=2, 4 ranks" in text and "runs/tiny/checkpoints/x" in text and "def f(x): return 1" in text
    assert "resume, step 21" in text


def test_the_verdict_says_below_or_above_each_entropy(tmp_path: Path) -> None:
    held_out = falling_loss(40)[-1]["eval_loss"]
    text = full(tmp_path).text
    assert f"{6.0 - held_out:.2f} below the unigram entropy (6.00)" in text
    assert f"{held_out - 3.0:.2f} above the bigram entropy (3.00)" in text


def test_dead_experts_are_named_and_the_busiest_is_measured(tmp_path: Path) -> None:
    text = full(tmp_path).text
    assert "1 dead expert (no token): layer 2 expert 1." in text
    # Layer 2: 300 of 300 + 6 x 100 + 0, over 8 experts.
    assert f"Busiest expert: {300 / (900 / 8):.2f} times the mean, in layer 2." in text


def test_every_promised_curve_is_drawn(tmp_path: Path) -> None:
    page = report(tmp_path)
    labels = [attrs.get("aria-label") for tag, attrs in page.elements if tag == "svg"]
    for name in ("Loss", "Gradient norm, before clipping", "Learning rate", "Speed", "Load-balancing loss"):
        assert f"{name} over step" in labels
    assert sum(tag == "polyline" for tag, _ in page.elements) == 7


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_run_that_hardly_began_has_a_report(tmp_path: Path, num_steps: int) -> None:
    assert "tiny <1>" in report(tmp_path, records=falling_loss(num_steps)).text


def test_a_run_that_ended_in_nan_has_a_report(tmp_path: Path) -> None:
    bad: Record = {"step": 41, "loss": float("nan"), "eval_loss": float("inf"), "grad_norm": float("inf")}
    page = full(tmp_path, records=[*falling_loss(40), bad])
    assert "nan" in page.text
    assert not [a for _, a in page.elements if re.search("nan|inf", str(a.get("points")))]


def test_a_long_run_stays_a_small_file(tmp_path: Path) -> None:
    report(tmp_path, records=falling_loss(20_000, eval_every=500))
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path, run_name="old")

    def full_disk(file: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        report(tmp_path, run_name="new")
    assert "<h1>old</h1>" in (tmp_path / "report.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_pipeline_schedule_is_shown_where_there_is_a_pipeline(tmp_path: Path) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=test", "parallel.pp=2"])
    assert "Pipeline schedule" in report(tmp_path, pipeline=run_pipeline(run)).text
    assert "Pipeline schedule" not in report(tmp_path).text


def test_texts_follow_each_other_by_step_and_of_many_some_are_shown(tmp_path: Path) -> None:
    lines = [
        {"step": step, "prompt": prompt, "text": f"{HOSTILE} {step}"}
        for step in range(1, 101)
        for prompt in ("a", HOSTILE)
    ]
    page = report(tmp_path, texts=lines)
    assert "Samples while training" in page.text and page.text.count("12 of 100 texts") == 2
    assert not {"script", "img"} & {tag for tag, attrs in page.elements if "src" in attrs}
    shown = re.findall(r"&amp;.* (\d+)$", "\n".join(page.texts), re.MULTILINE)
    assert len(shown) == 24 and shown[0] == "1" and shown[-1] == "100" and shown[:12] == sorted(shown[:12], key=int)
