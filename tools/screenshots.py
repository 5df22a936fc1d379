"""Pictures of a run's report by headless Chromium, for a README: its head and curves, and its experts.

  python tools/screenshots.py runs/tiny-4/report.html --out docs/images

exit status: 0 good; 2 no such report, or no Chromium.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.errors import Gpt4MoeError, LaunchError
from tests.browser import Browser, find_program

WIDTH, MAX_HEIGHT, GAP = 1120, 1080, 20
EXPERTS_TOP = '[...document.querySelectorAll("h2")].find(it => it.textContent === "Experts")?.offsetTop'

# Of the last chart or card that ends before `end`: no chart is cut through.
BOTTOM = (
    'Math.max(...[...document.querySelectorAll("figure, .card")].map(it => it.getBoundingClientRect().bottom)'
    ".filter(it => it <= {end}))"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where report*.png go")
    given = parser.parse_args(arguments)
    try:
        shots = pictures(given.report)
        given.out.mkdir(parents=True, exist_ok=True)
        for name, picture in shots.items():
            file = given.out / name
            file.write_bytes(picture)
            sys.stdout.write(f"{file}  {len(picture) / 1000:.0f} kB\n")
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def pictures(report: Path) -> dict[str, bytes]:
    """File name -> PNG. Raises: LaunchError."""
    program = find_program()
    if not report.is_file() or program is None:
        what = "No Chromium is installed" if report.is_file() else f"{report} is not there"
        raise LaunchError(f"{what}.", "Give the report of a run; have chromium on the PATH, or set CHROMIUM=/path.")
    with Browser(program, width=WIDTH) as browser:
        browser.open(report)
        experts = browser.evaluate(EXPERTS_TOP)
        tops = {"report.png": 0} | ({"report-experts.png": experts - GAP} if experts else {})
        bottoms = {top: browser.evaluate(BOTTOM.format(end=top + MAX_HEIGHT)) + GAP for top in tops.values()}
        return {name: browser.screenshot(top=top, height=bottoms[top] - top) for name, top in tops.items()}


if __name__ == "__main__":
    sys.exit(main())
