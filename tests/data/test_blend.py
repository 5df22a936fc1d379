"""Shares from shares, epochs or tokens; how often a run reads a source, and that it may not read it more often."""

import json
import re
from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.blend import phases_of, uses
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import check_data
from gpt4moe.data.loader import build_data
from gpt4moe.data.overview import distinct_tokens, overview, tokens_of_epochs
from gpt4moe.errors import ConfigError, DataError
from tests.data.conftest import small_run
from tools.plan import main as plan_main

TOKENS = {"alpha": 4000.0, "beta": 1000.0}


def shares(*overrides: str) -> dict[str, float]:
    return phases_of(small_run(None, *overrides), TOKENS)[0].shares


def test_without_a_word_sources_count_by_their_tokens() -> None:
    assert shares() == {"alpha": 0.8, "beta": 0.2}


def test_epochs_multiply_tokens() -> None:
    assert shares("++data.sources={alpha: {epochs: 2}, beta: {epochs: 4}}") == pytest.approx(
        {"alpha": 2 / 3, "beta": 1 / 3}
    )


def test_shares_are_what_they_are() -> None:
    assert shares("++data.sources={alpha: 3, beta: {share: 1}}") == {"alpha": 0.75, "beta": 0.25}
    assert shares("++data.sources={alpha: 3, beta: 0}") == {"alpha": 1.0}


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("{alpha: {shares: 1}}", "Unknown key data.sources.alpha.shares"),
        ("{alpha: 1, beta: {epochs: 2}}", "beta has none"),
        ("{alpha: -1}", "alpha.share=-1"),
        ("{alpha: 0, beta: 0}", "no share above 0"),
        ("{alpha: {epochs: 0}}", "reads nothing"),
        ("{alpha: {max_epochs: many}}", "is no number"),
        ("{alpha: [1]}", "is no number"),
        ("{alpha: true}", "is no number"),
        ("{alpha: .nan}", "is no number"),
        ("{alpha: {share: 1, origin: 3}}", "is no text"),
        ("{alpha: {share: 1, epochs: 2}}", "share=1 and epochs=2"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(sources: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        small_run(None, f"++data.sources={sources}")
    assert words in refusal.value.cause


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("[{from_tokens: 0, shares: {alpha: 1}}]", "does not follow 0"),
        ("[{from_tokens: 9, shares: {alpha: 1}}, {from_tokens: 9, shares: {alpha: 1}}]", "does not follow 9"),
        ("[{from_tokens: 9}]", "no share above 0"),
        ("[{from_tokens: 9, shares: {alpha: -1}}]", "is not a share"),
        ("[{from_token: 9, shares: {alpha: 1}}]", "from_token"),
    ],
)
def test_phases_that_make_no_sense_are_refused(phases: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        small_run(None, f"data.phases={phases}")
    assert words in refusal.value.cause


def test_a_phase_of_an_unknown_source_is_refused(data_folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.phases\[0\]\.shares\.gamma is not in the data folder"):
        check_data(small_run(data_folder, "data.phases=[{from_tokens: 64, shares: {gamma: 1}}]"))


def test_a_phase_is_read_from_its_token_on_and_belongs_to_the_identity(data_folder: Path) -> None:
    phase = "data.phases=[{from_tokens: 160, shares: {beta: 1}}]"
    with_phase, without = small_run(data_folder, phase), small_run(data_folder)
    samples = [[build_data(run).train.sample(n) for n in range(14)] for run in (with_phase, without)]
    for n in range(10):
        assert (samples[0][n].tokens == samples[1][n].tokens).all()
    assert {sample.source_index for sample in samples[0][10:]} == {1}
    assert check_data(with_phase).identity["data"] != check_data(without).identity["data"]


def test_a_source_is_not_read_more_often_than_it_may(data_folder: Path) -> None:
    limited = "++data.sources={alpha: {max_epochs: 24}, beta: {max_epochs: 24}}"

    def run(steps: int) -> RunConfig:
        sizes = ("training.global_batch_size=8", "training.micro_batch_size=8", f"training.steps={steps}")
        return small_run(data_folder, limited, *sizes)

    for use in overview(run(125))["sources"]:
        assert 23 <= use["epochs"] <= 24
    check_data(run(125))
    with pytest.raises(DataError) as refusal:
        check_data(run(250))
    assert "training.steps=250 reads it 4" in refusal.value.cause
    assert "max_epochs is 24" in refusal.value.cause
    steps = re.search(r"training.steps=(\d+) or fewer", refusal.value.cure)
    assert steps
    check_data(run(int(steps[1]) // 125 * 125))


@pytest.mark.parametrize("others", [1.0, 0.02, 30])
def test_the_share_that_a_refusal_names_fits_whatever_the_other_shares_are(data_folder: Path, others: float) -> None:
    def checked(alpha: float) -> None:
        sources = f"++data.sources={{alpha: {{share: {alpha}, max_epochs: 10}}, beta: {others}}}"
        sizes = ("training.global_batch_size=8", "training.micro_batch_size=8", "training.steps=250")
        check_data(small_run(data_folder, sources, *sizes))

    with pytest.raises(DataError) as refusal:
        checked(others)
    share = re.search(r"alpha is at most ([\d.]+)% of the run \(it is 50\.0%\)", refusal.value.cure)
    assert share
    most = float(share[1]) / 100
    checked(most / (1 - most) * others)
    with pytest.raises(DataError):
        checked((most + 0.02) / (1 - most - 0.02) * others)


def test_gpt4s_13_trillion_tokens_are_planned_without_a_file() -> None:
    found = overview(load_run_config(["+experiment=gpt4", "run.name=t"]))
    assert found["is_planned"]
    assert found["tokens_read"] == pytest.approx(13e12, rel=0.01)
    by_name = {one["source"]: one for one in found["sources"]}
    assert {"common_crawl", "refined_web", "code"} <= by_name.keys()
    for name, one in by_name.items():
        assert one["epochs"] == pytest.approx(4 if name == "code" else 2, rel=0.01)
        assert one["epochs"] <= one["max_epochs"]
        assert one["origin"].startswith(("reported", "speculated"))
    assert found["disk_bytes"] == 4 * found["tokens"]
    with pytest.raises(DataError, match=r"Source code has .* reads it 4\.\d\d times; .*max_epochs is 4"):
        overview(load_run_config(["+experiment=gpt4", "run.name=t", "training.steps=250000"]))


def test_epochs_of_a_plan_are_those_of_its_sources() -> None:
    gpt4 = load_run_config(["+experiment=gpt4", "run.name=t"])
    assert tokens_of_epochs(gpt4, 1) == pytest.approx(13e12, rel=0.01)
    mine = ["+experiment=tiny", "run.name=t", "data.path=nowhere", "+data.sources.mine={tokens: 2e6}"]
    tokens = tokens_of_epochs(load_run_config(mine), 2.5)
    assert tokens == pytest.approx(5e6, rel=1e-3)
    for override, told in (
        ("data=mock", "synthetic"),
        ("++data.sources.mine.share=1", r"data\.sources\.mine\.share"),
        ("data.phases=[{from_tokens: 160, shares: {mine: 1}}]", r"data\.phases"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            tokens_of_epochs(load_run_config([*(mine if override != "data=mock" else mine[:2]), override]), 2.0)
        assert "epochs=2" in caught.value.cause and caught.value.cure.startswith("Set ")
    unpacked = load_run_config([*mine, "stage=sft", "data.pack=false"])
    with pytest.raises(DataError, match=r"data\.pack=false"):
        tokens_of_epochs(unpacked, 2.0)


def test_text_on_disk_counts_once_whatever_the_epochs_of_its_source(data_folder: Path) -> None:
    once = {name: Catalogue.open([data_folder]).train_tokens()[name] for name in ("alpha", "beta")}
    run = small_run(data_folder, "++data.sources={alpha: {epochs: 2}, beta: {epochs: 4}}")
    assert distinct_tokens(run) == sum(once.values())
    assert tokens_of_epochs(run, 3) == pytest.approx(3 * (2 * once["alpha"] + 4 * once["beta"]), rel=0.05)
    assert distinct_tokens(small_run(data_folder, "++data.sources={beta: 1}")) == once["beta"]
    planned = ["+experiment=tiny", "run.name=t", "data.path=nowhere"]
    assert distinct_tokens(load_run_config(planned)) is None
    assert distinct_tokens(load_run_config([*planned, "+data.sources.mine={tokens: 2e6, epochs: 3}"])) == 2e6
    with pytest.raises(DataError, match=r"data\.sources\.gamma is no source of"):
        distinct_tokens(small_run(data_folder, "++data.sources={gamma: 1}"))


def test_a_plan_is_no_data_to_train_on() -> None:
    with pytest.raises(DataError, match="data/gpt4_13t does not exist"):
        check_data(load_run_config(["+experiment=gpt4", "run.name=t"]))


def test_uses_add_up_to_the_run(data_folder: Path) -> None:
    run = small_run(data_folder, "data.phases=[{from_tokens: 160, shares: {beta: 1}}]")
    found = uses(run, TOKENS, phases_of(run, TOKENS))
    assert sum(use.samples for use in found) == run.training.steps * run.training.global_batch_size
    assert sum(use.share for use in found) == pytest.approx(1)


def test_a_plan_says_that_a_run_is_refused_which_would_read_a_source_too_often(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "++data.sources.code.max_epochs"
    warnings = []
    for most in (4, 3):
        assert plan_main(["+experiment=gpt4", f"{code}={most}", "output=json"]) == 0
        warnings.append([one for one in json.loads(capsys.readouterr().out)["warnings"] if "refuses such a run" in one])
    assert warnings[0] == []
    (said,) = warnings[1]
    assert "Source code has 250,000,000,000 tokens" in said and "max_epochs is 3" in said and "training.steps=" in said
