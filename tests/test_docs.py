"""Pages for people stay short, are listed, and point at what exists."""

import re
from pathlib import Path

import pytest

from gpt4moe.config.load import config_to_dict, load_run_config
from tests.test_house import NARROW, STOREYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")] + PAGES


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_at_most_200_lines(page: Path) -> None:
    limit = 300 if page.name == "performance.md" else 200  # what benchmarks printed, section by section
    assert len(page.read_text().splitlines()) <= limit


def test_the_table_of_contents_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {page.name for page in PAGES} - {"index.md"}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """In backticks, from the root or inside the package."""
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|yaml|md|env))`", page.read_text()))
    roots = (ROOT, ROOT / "gpt4moe", ROOT / "configs")
    written_by_a_reader = re.compile(r"^(runs|data|starts)/|NAME|softplus")
    missing = {name for name in named if not written_by_a_reader.search(name)}
    assert {name for name in missing if not any((root / name).exists() for root in roots)} == set()


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_table_of_rooms_allows_no_import_that_the_house_forbids() -> None:
    rows = re.findall(r"^\| \d \| `(\w+)` \|.*\| ([^|]*) \|$", ARCHITECTURE, re.MULTILINE)
    listed = {room: set(re.sub(r"\(.*?\)", "", rooms).split(", ")) for room, rooms in rows if room in NARROW}
    assert len(listed) > 10
    named = {room: {name.strip() for name in rooms} & STOREYS.keys() for room, rooms in listed.items()}
    assert {room: names - NARROW[room] for room, names in named.items() if names - NARROW[room]} == {}


def test_modules_that_the_page_of_rooms_names_exist() -> None:
    names = re.findall(r"`([a-z_]+)\.([a-z_]+)`", ARCHITECTURE)
    keys = config_to_dict(load_run_config(["+experiment=tiny", "run.name=x"]))
    rooms = [(room, name) for room, name in names if room in STOREYS and name not in {"py", *keys.get(room, {})}]
    assert ("data", "mixture") in rooms
    assert [pair for pair in rooms if not (ROOT / "gpt4moe" / pair[0] / f"{pair[1]}.py").exists()] == []
