"""The preflight on gloo ranks: the whole way, with what is planted on single ranks."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.load import load_run_config
from gpt4moe.launch.evidence import needs
from gpt4moe.launch.rank_files import data_facts, data_files
from gpt4moe.parallel.layout import Layout
from tests.launch.faults import Planted, flown
from tests.numbered_lines import numbered_lines
from tests.spawn import run_ranks
from tests.training.command import SMALL, train

MODEL = [
    "+experiment=tiny", "run.name=x", "model.num_layers=2", "model.hidden_size=32", "model.seq_length=16",
    "model.moe.num_experts=4", "model.moe.ffn_hidden_size=16", "training.global_batch_size=8",
    "parallel.tp=2", "parallel.ep=2",
]  # fmt: skip
MOCK = [*MODEL, "model.vocab_size=64", "data=mock"]


def fly(tmp_path: Path, overrides: list[str], planted: Planted | None = None, come_seconds: float = 60.0) -> Any:
    """The first rank's report, its checks by name; every other rank that came has ended with the same status."""
    root = tmp_path / "runs"
    answers = run_ranks(4, flown, [*overrides, f"run.root={root}"], planted or {}, come_seconds)
    report, others = answers[0], [status for status in answers[1:] if status is not None]
    assert set(others) == {0 if report["fit"] else 1}
    assert list(root.iterdir()) == [], "nothing is left behind"
    return report | {"checks": {check["name"]: check for check in report["checks"]}}


def status(report: Any, name: str) -> str:
    return str(report["checks"][name]["status"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_lines(tmp_path_factory.mktemp("corpus"))


def test_four_healthy_ranks_are_fit_and_every_group_is_measured(tmp_path: Path, corpus: Path) -> None:
    report = fly(tmp_path, [*MODEL, "model.vocab_size=300", f"data.path={corpus}"])
    assert report["fit"], json.dumps(report, indent=1)
    for name in ("ranks", "versions", "layout", "data", "run folder", "disk space", "write speed", "first checkpoint"):
        assert status(report, name) == "passed"
    for name in ("tp all-reduce", "tp all-to-all", "ep all-to-all", "dp_cp all-reduce", "expert_dp all-reduce"):
        assert report["checks"][name]["measured"].split()[1] == "GB/s"
    assert report["checks"]["cp, etp, pp"]["measured"] == "groups of one rank"
    assert status(report, "GPUs") == status(report, "node links") == "not checked"


def test_unlike_ranks_are_named_and_their_groups_are_not_tried(tmp_path: Path) -> None:
    report = fly(tmp_path, MOCK, {1: "no data", 2: "other torch", 3: "sees nothing"})
    assert "torch 2.8.0 on rank 2" in report["checks"]["versions"]["measured"]
    assert "rank 3" in report["checks"]["run folder"]["measured"]
    assert status(report, "groups") == "not checked"
    assert status(report, "versions") == status(report, "run folder") == "failed"


def test_data_missing_on_one_rank_is_a_failure_that_names_it(tmp_path: Path, corpus: Path) -> None:
    report = fly(tmp_path, [*MODEL, "model.vocab_size=300", f"data.path={corpus}"], {1: "no data", 3: "slow"})
    assert (status(report, "data"), status(report, "matrix products")) == ("failed", "failed")
    assert report["checks"]["data"]["measured"].startswith("rank 1 (")
    assert "/nowhere does not exist" in report["checks"]["data"]["measured"]
    speeds = report["checks"]["matrix products"]["measured"]
    # On a machine with fewer cores than ranks another one may be slow too.
    assert "slowest rank 3 (" in speeds and re.search(r"slow: ranks? ([0-2], )*3 \(", speeds)


def test_nodes_are_measured_in_pairs_also_when_they_are_uneven(tmp_path: Path) -> None:
    report = fly(tmp_path, MOCK, {0: "on a", 1: "on a", 2: "on b", 3: "on c"})
    assert (report["nodes"], status(report, "ranks")) == (["a", "b", "c"], "warned")
    assert "the slowest of 3" in report["checks"]["node links"]["measured"]
    assert status(report, "placement") == "failed", "tp 2 of ranks 2 and 3 lies on two nodes"


def test_a_rank_that_stays_away_is_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    report = fly(tmp_path, MOCK, {2: "stays away"}, come_seconds=6.0)
    assert report["checks"]["ranks"]["measured"].startswith("rank 2 did not come")
    assert status(report, "groups") == "not checked"
    assert status(report, "run folder") == "passed"


def test_a_rank_that_breaks_off_among_groups_is_told_from_those_it_left(tmp_path: Path) -> None:
    report = fly(tmp_path, MOCK, {0: "is left", 1: "breaks off", 2: "is left", 3: "is left"})
    assert status(report, "groups") == "failed"
    measured = report["checks"]["groups"]["measured"]
    assert measured.startswith("rank 1 (") and "): the card fell off the bus; rank" in measured


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    wide = ("model.hidden_size=128", "training.steps=1")
    assert train(tmp_path / "x", *wide)[0].status == 0
    written = sum(file.stat().st_size for file in (tmp_path / "x" / "checkpoints").rglob("*.safetensors"))
    run = load_run_config([*SMALL, *wide, "run.name=x"])
    planned = needs(run, Layout.from_config(run.parallel, 1)).checkpoint_bytes
    assert planned < written < 1.02 * planned, "headers and paddings come on top"


def test_the_fingerprint_changes_with_a_byte_of_the_tokens(tmp_path: Path, corpus: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    run = load_run_config([*MODEL, "model.vocab_size=300", f"data.path={copy}"])
    before = data_facts(run).fingerprint
    tokens = copy / "alpha" / "train-00000.bin"
    assert tokens in data_files(run)
    changed = bytearray(tokens.read_bytes())
    hashed = file_sha256(tokens)
    changed[10] ^= 1
    tokens.write_bytes(changed)
    assert file_sha256(tokens) != hashed
    assert before and data_facts(run).fingerprint not in ("", before)
