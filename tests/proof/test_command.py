"""tools/prove_layout.py: exit status and JSON, on equal ranks, with a planted fault, and for input that is none."""

import json
from typing import Any

import pytest

from gpt4moe.parallel import local_ranks
from gpt4moe.proof import prove
from tests.proof.faults import tool_phases
from tools.prove_layout import main

pytestmark = pytest.mark.layouts

RUN = ("+experiment=tiny", "data=mock", "router@model.moe.router=sigmoid_bias",
       "model.moe.shared_expert_ffn_hidden_size=96", "parallel.tp=2", "ranks=2", "--json")  # fmt: skip

KEYS = {"failed", "equal", "asked_layout", "meshes", "on_no_mesh", "not_proved", "seconds"}


@pytest.fixture(autouse=True)
def one_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of tests.spawn has all that ranks import."""
    monkeypatch.setattr(local_ranks, "preload", lambda *modules: None)


def proof(capsys: pytest.CaptureFixture[str], status: int) -> dict[str, Any]:
    assert main(list(RUN)) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    (mesh,) = found["meshes"]
    assert found.keys() == KEYS
    assert found["equal"] == mesh["equal"] and mesh["reduced"] == found["on_no_mesh"] == []
    return mesh | {"not_proved": found["not_proved"]}


def test_equal_ranks_exit_0_and_say_in_json_what_was_compared_and_what_was_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = proof(capsys, 0)
    assert found["equal"] and found["first_difference"] is None
    assert found["suspects"] == found["between_ranks"] == []
    assert found["clipped_steps"] == 3
    compared = {(item["family"], item["kind"]) for item in found["families"]}
    assert {("experts down", "gradient"), ("shared experts", "gradient"), ("router", "buffer"),
            ("embedding", "exp_avg_sq"), ("output layer", "weight")} <= compared  # fmt: skip
    assert all(item["equal"] and item["relative"] <= item["tolerance"] for item in found["families"])
    assert {item["name"] for item in found["numbers"]} == {
        "loss", "gradient norm", "auxiliary losses", "router statistics", "tokens per expert",
    }  # fmt: skip
    assert any(change["key"] == "model.moe.router.bias_update_rate" for change in found["changes"])
    assert any("GPU kernels" in line for line in found["not_proved"])


def test_a_bias_that_moves_the_wrong_way_exits_1_and_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "rank_phases", tool_phases)
    found = proof(capsys, 1)
    assert not found["equal"]
    assert found["first_difference"]["tensor"] == "decoder.layers.0.mlp.router.bias"
    assert found["first_difference"]["kind"] == "buffer"
    assert any(line.startswith("router state") for line in found["suspects"]), found["suspects"]


def test_a_rank_that_fails_exits_1_with_the_json_of_a_proof(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise local_ranks.RanksFailed("rank 1 fell over")

    monkeypatch.setattr(prove, "run_ranks", fail)
    assert main(list(RUN)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == "rank 1 fell over" and not found["equal"] and found["meshes"] == []
    assert found.keys() == KEYS


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["+experiment=tiny", "parallel.tp=3"], "tp=3"),
        (["+experiment=tiny", "parallel.tp=2", "ranks=3"], "3"),
        (["+experiment=tiny", "ranks=none"], "ranks=none"),
        (["+experiment=tiny", "ranks=0"], "ranks=0"),
        (["+experiment=tiny", "ranks=99999999999999999999"], "ranks=9999"),
        (["+experiment=tiny", "ranks=" + "9" * 5000], "ranks=9999"),
        (["+experiment=tiny", "parallel.ep=99999999999"], "parallel.ep=99999999999"),
        (["+experiment=tiny", "output=yaml"], "output=yaml"),
        (["+experiment=tiny", "model.mo.top_k=2"], "model.mo"),
    ],
)
def test_input_that_the_trainer_would_refuse_exits_2_before_any_rank_starts(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr(prove, "run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert word in said.err and said.out == "" and "Traceback" not in said.err
