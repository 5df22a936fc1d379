"""docs/layouts.md says what the functions that refuse say; every pair of degrees that they accept is tested."""

from itertools import combinations
from pathlib import Path

from gpt4moe.parallel.support_table import DEGREES, SETTINGS, SUPPORT_COLUMNS, refusal, support_table
from tests.distributed.layouts import LAYOUTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "layouts.md").read_text()


def test_the_page_holds_the_table_that_the_checks_give() -> None:
    assert support_table() in PAGE, "python -m gpt4moe.parallel.support_table prints the new one"


def test_the_table_tells_apart_what_is_refused_alone_and_together() -> None:
    table = support_table().splitlines()
    rows = dict(zip(SETTINGS, (line.strip("| ").split(" | ")[1:] for line in table[2:]), strict=False))
    assert rows["engine.offload_optimizer=true"][0].startswith("no")
    assert rows["engine.offload_optimizer=true"][list(SUPPORT_COLUMNS).index("engine=deepspeed")] == "yes"
    assert rows["sequence_parallel=false"][:3] == ["yes", "no (1)", "yes"]
    overlap, deepspeed = SETTINGS["engine.overlap_grad_reduce=true"], SUPPORT_COLUMNS["engine=deepspeed"]
    assert refusal(overlap) is None and refusal(deepspeed) is None
    assert "overlap_grad_reduce" in (refusal(overlap, deepspeed) or "")


def test_every_accepted_pair_of_degrees_is_in_a_layout_of_the_tests() -> None:
    degrees = [name.split("=")[0] for name in DEGREES if " " not in name] + ["vpp"]
    together = [{key.split(".")[1].split("=")[0] for key in case.overrides} for case in LAYOUTS.values()]
    assert [f"{a} with {b}" for a, b in combinations(degrees, 2) if not any({a, b} <= case for case in together)] == []
    assert "Every pair of degrees is in one of them" in PAGE
