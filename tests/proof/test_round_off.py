"""Where round-off may explain a difference: tolerances are measured, other tokens are asked, and what stays open is
said, with an exit status of its own."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof import command, plan, round_off
from gpt4moe.proof.compare import NumberDifference
from gpt4moe.proof.outcome import Outcome
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.prove import Outcomes, Proof, judge, prove_shrunk
from gpt4moe.proof.shrink import Shrunk
from tests.proof.faults import EP2
from tests.proof.test_faults import RUN, one_process
from tests.proof.test_ties import NEAR, flipped, proved
from tools.prove_layout import main

pytestmark = pytest.mark.layouts

MOMENT = "decoder.layers.1.mlp.router.weight"
BF16 = "precision=bf16"


def small(*more: str) -> Shrunk:
    run = load_run_config([*RUN, *EP2, *more])
    layout = Layout.from_config(run.parallel, 2)
    return Shrunk(asked=run, asked_layout=layout, run=run, layout=layout)


def off(outcome: Outcome, share: float, names: Sequence[str] = (MOMENT,)) -> Outcome:
    """First moments that are a `share` of themselves away."""
    moved = {name: outcome.tensors["exp_avg"][name] * np.float32(1 + share) for name in names}
    return dataclasses.replace(outcome, tensors=outcome.tensors | {"exp_avg": outcome.tensors["exp_avg"] | moved})


def judged(share: float, nudges: Sequence[Outcome]) -> Proof:
    want = one_process()
    return judge(small(), want | {plan.ADAMW: off(want[plan.ADAMW], share)}, want, 0.0, nudged=nudges)


def nudged(share: float) -> list[Outcome]:
    return [off(one_process()[plan.ADAMW], share) for _ in range(plan.DRAWS)]


def test_a_moment_is_held_to_three_times_what_one_process_shows_of_itself() -> None:
    assert judged(3e-4, []).verdict == "different", "1e-4 without a measurement"
    right, wrong = judged(3e-4, nudged(1.5e-4)), judged(6e-4, nudged(1.5e-4))
    assert right.is_equal and "AdamW's tolerance was measured" in right.measured
    assert wrong.verdict == "different" and wrong.first is not None and wrong.first.name == MOMENT


def test_a_measured_tolerance_reaches_no_fault_and_beyond_it_nothing_is_decided() -> None:
    for share in (4e-3, 0.1):
        assert judged(share, nudged(2e-4)).verdict == "different"
    shaky = judged(4e-3, nudged(3e-3))
    assert shaky.verdict == "undecided" and "one process itself moves more" in shaky.undecided


def test_nudged_runs_that_choose_other_experts_measure_nothing() -> None:
    elsewhere = [flipped(outcome, 2) for outcome in nudged(1e-3)]
    assert round_off.same_choices(elsewhere, one_process()[plan.ADAMW]) == []
    proof = judged(3e-4, elsewhere)
    assert proof.verdict == "undecided" and "choose other experts" in proof.undecided


def test_the_nudged_runs_start_only_where_adamw_alone_is_off() -> None:
    asked: list[str] = []

    def start(world_size: int, phases: dict[str, Phase]) -> Outcomes:
        asked.extend(phases)
        want = one_process()
        if world_size > 1:
            return want | {plan.ADAMW: off(want[plan.ADAMW], 2e-4)}
        return {name: want.get(name, off(want[plan.ADAMW], 1e-4)) for name in phases}

    assert prove_shrunk(small(), start).is_equal
    assert [name for name in asked if "nudged" in name] == [f"adamw nudged {draw}" for draw in (1, 2, 3, 4)]


def in_bf16(excess: float, times: int) -> Proof:
    """The loss of the second step is `excess` tolerances off, on the first `times` sets of tokens."""
    want, shrunk = one_process(BF16), small(BF16)
    (tolerance,) = [item.tolerance for item in _rounded(judge(shrunk, want, want, 0.0)) if item.name == "loss"]
    exact = want[plan.ADAMW].losses
    losses = [want[plan.ROUNDED].losses[0], exact[1] * (1 + excess * tolerance), want[plan.ROUNDED].losses[2]]
    spoilt = want | {plan.ROUNDED: dataclasses.replace(want[plan.ROUNDED], losses=losses)}

    def start(world_size: int, phases: dict[str, Phase]) -> Outcomes:
        tokens = next(iter(phases.values())).tokens
        return spoilt if world_size > 1 and tokens < times else want

    return prove_shrunk(shrunk, start)


def _rounded(proof: Proof) -> list[NumberDifference]:
    return proof.numbers[plan.ROUNDED]


def test_one_bf16_number_that_is_slightly_off_is_asked_again_on_other_tokens() -> None:
    proof = in_bf16(1.5, times=1)
    (aside,) = proof.set_aside
    assert proof.is_equal and aside.startswith("tokens 1: bf16 loss is ")


@pytest.mark.parametrize(("excess", "times"), [(1.5, 3), (2.5, 1)], ids=["on every set", "by more than twice"])
def test_a_bf16_number_that_stays_off_or_is_far_off_is_a_difference(excess: float, times: int) -> None:
    assert in_bf16(excess, times).verdict == "different"


def test_what_is_not_decided_exits_3_in_words_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = proved({plan.ADAMW: flipped(one_process()[plan.ADAMW], 2)}, margin=NEAR, times=9)
    assert proof.verdict == "undecided" and not proof.is_equal
    monkeypatch.setattr(command, "prove", lambda *_: [proof])
    assert main(["+experiment=tiny"]) == 3
    assert "NOT DECIDED: in each of 3 sets of tokens" in capsys.readouterr().out
    assert main(["+experiment=tiny", "--json"]) == 3
    (mesh,) = json.loads(capsys.readouterr().out)["meshes"]
    assert mesh["verdict"] == "undecided" and mesh["undecided"] and not mesh["equal"]


def test_a_log_keeps_the_heads_of_all_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = one_process(BF16)
    monkeypatch.setattr(command, "prove", lambda *_: [judge(small(BF16), want, want, 0.0)])
    assert main(["+experiment=tiny"]) == 0
    shown = capsys.readouterr().out
    assert all(head in shown for head in ("exp_avg_sq", "gradient", "replayed")) and "…" not in shown


def test_a_slight_difference_is_not_called_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, words in ((2e-4, "a fault stays"), (0.1, "does not compute what one process computes")):
        monkeypatch.setattr(command, "prove", lambda *_, share=share: [judged(share, [])])
        assert main(["+experiment=tiny"]) == 1
        assert words in capsys.readouterr().out
