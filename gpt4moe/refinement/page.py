"""A search as one self-contained HTML page: score and right answers over rounds, and the texts of each task."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from gpt4moe.pages.charts import Chart, Series, line_chart
from gpt4moe.pages.report_page import POLICY, SCRIPT, STYLE
from gpt4moe.refinement.search import Course, Plan
from gpt4moe.refinement.summary import best_scores, mean, right_shares, summary
from gpt4moe.runlog.run_files import replace_file

MOST_TASKS = 100
"""With their texts on the page; the trace has all."""


def write_rounds_page(path: Path, courses: Sequence[Course], plan: Plan, scorer: str) -> None:
    """Writes the page with an atomic rename."""
    rounds = range(1, plan.rounds + 1)
    drawn = [mean([course.candidates[r - 1].score for course in courses]) for r in rounds]
    best = best_scores(courses, plan.rounds)
    # Rounds are counted from 1 here, and the axis of these charts is called "step".
    charts = [
        Chart(title="Score", unit="mean over tasks; one step is one round", series=[
            Series(name="best so far", points=list(zip(rounds, best, strict=True))),
            Series(name="of this round", points=list(zip(rounds, drawn, strict=True)), look="raw"),
        ], first_colour=1),
    ]  # fmt: skip
    shares = right_shares(courses, plan.rounds)
    if shares is not None:
        points = [(float(r), 100 * share) for r, share in zip(rounds, shares, strict=True)]
        charts.append(Chart(title="Right", unit="% of tasks; one step is one round", first_colour=3,
                            series=[Series(name="best so far", points=points)]))  # fmt: skip
    said = "".join(f'<p class="under-title">{escape(line)}</p>' for line in summary(courses, plan, scorer).split("\n"))
    more = f"<p>The first {MOST_TASKS} of {len(courses)} tasks.</p>" if len(courses) > MOST_TASKS else ""
    template = f"<p>A candidate is drawn from <code>{escape(repr(_template(plan)))}</code>.</p>"
    body = (
        f'{said}<section><h2>Rounds</h2><div class="charts">{"".join(map(line_chart, charts))}</div>'
        f"{template}</section>"
        f"<section><h2>Texts</h2>{more}{''.join(map(_task, courses[:MOST_TASKS]))}</section>"
    )
    write_page(path, f"{plan.method} by {scorer}", body)


def write_page(path: Path, title: str, body: str) -> None:
    """A page with the style and the script of a run's report."""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    replace_file(path, page.encode())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML; every cell is text."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _template(plan: Plan) -> str:
    return plan.template if plan.method == "refine" else plan.first_template


def _task(course: Course) -> str:
    answer = course.task.answer
    rows = [
        (str(one.round + 1), f"{one.score:.4g}", "kept" if one.is_best else "", _mark(one.answer, answer), one.text)
        for one in course.candidates
    ]
    known = "" if answer is None else f", right is {answer!r}"
    heading = f"{course.task.id}: {course.task.text!r} best {course.best.text!r}{known}"
    last = f"<pre>{escape(course.candidates[-1].prompt)}</pre>"
    return (
        f"<details><summary>{escape(heading)}</summary>{table(('round', 'score', '', '', 'text'), rows)}"
        f"<p>What the last candidate was drawn from:</p>{last}</details>"
    )


def _mark(answer: str, right: str | None) -> str:
    return "" if right is None else "right" if answer == right else "wrong"
