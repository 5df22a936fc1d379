"""Bad input ends with status 2 and two lines on stderr, a cause and a cure, from one rank, before torch is loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.numbered_lines import VOCABULARY, plant_token
from tests.training.command import SMALL, Ended, outside, train

ROOT = Path(__file__).resolve().parents[2]

# what is wrong: (overrides, ranks, words of the cause, words of the cure)
BAD_INPUTS: dict[str, tuple[list[str], int, list[str], list[str]]] = {
    "misspelt key": (["model.hiden_size=64"], 1, ["Unknown key model.hiden_size"], ["model.hidden_size?"]),
    "misspelt key behind +": (["+parallel.tpp=2"], 1, ["Unknown key parallel.tpp"], ["parallel.tp?"]),
    "misspelt key behind ++": (["++trainning.steps=3"], 1, ["Unknown key trainning"], ["training?"]),
    "misspelt choice": (["precision=fp23"], 1, ["precision/fp23"], ["fp32"]),
    "misspelt experiment": (["+experiment=tinny"], 1, ["experiment"], ["tiny"]),
    "value of another type": (["training.steps=many"], 1, ["training.steps", "many"], []),
    "world": (["parallel.pp=3"], 2, ["pp=3", "does not divide the 2 ranks"], ["multiple of 3", "[1, 2]"]),
    "heads": (["model.num_query_groups=1", "parallel.tp=2"], 2, ["tp=2", "num_query_groups=1"], ["one of [1]"]),
    "layers": (["parallel.pp=2", "parallel.vpp=2"], 2, ["= 4 stages", "num_layers=2"], ["2 or less"]),
    "experts": (
        ["model.moe.num_experts=3", "parallel.ep=2"], 2, ["ep=2", "num_experts=3"], ["one of [1, 3]"]),
    "experts over ranks": (["parallel.ep=4"], 2, ["ep=4", "does not divide tp x cp x dp = 2"], ["one of [1, 2]"]),
    "batch": (["training.global_batch_size=7"], 2, ["global_batch_size=7", "dp 2"], ["multiple of 2"]),
    "missing corpus": (["data=demo", "data.path=CORPUS/none"], 1, ["CORPUS/none does not exist"], ["make data"]),
    "missing tokenizer": (["data.tokenizer=CORPUS/none.json"], 1, ["CORPUS/none.json is missing"], ["data=mock"]),
    "vocabulary": (
        ["data=demo", "data.path=CORPUS"], 1, ["vocab_size=256", f"vocabulary of {VOCABULARY}"],
        [f"model.vocab_size={VOCABULARY}"]),
}  # fmt: skip


def cause_and_cure(ended: list[Ended]) -> tuple[str, str]:
    """The two lines of the first rank; everything else that a refusal promises is checked."""
    assert [rank.status for rank in ended] == [2] * len(ended)
    assert {rank.out for rank in ended} == {""} and {rank.err for rank in ended[1:]} <= {""}
    cause, cure = ended[0].err.splitlines()
    assert cause.startswith("error: ") and cure.startswith("fix: ")
    return cause, cure


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_it_says_what_is_wrong_and_what_would_do(name: str, tmp_path: Path, corpus: Path) -> None:
    overrides, ranks, cause_words, cure_words = BAD_INPUTS[name]
    overrides = [override.replace("CORPUS", str(corpus)) for override in overrides]
    cause, cure = cause_and_cure(train(tmp_path / "x", *overrides, ranks=ranks))
    assert [word for word in cause_words if word.replace("CORPUS", str(corpus)) not in cause] == [], cause
    assert [word for word in cure_words if word not in cure] == [], cure
    assert not (tmp_path / "x").exists()


def test_a_token_beyond_the_vocabulary_is_refused_where_an_embedding_over_tp_would_not_see_it(
    tmp_path: Path, corpus: Path
) -> None:
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    for place in range(0, 400, 10):
        plant_token(folder / "alpha", "train-00000", place, VOCABULARY + place)
    data = ("data=demo", f"data.path={folder}", f"model.vocab_size={VOCABULARY}", "parallel.tp=2", "parallel.ep=2")
    ended = train(tmp_path / "x", *data, ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert "has the token 3" in cause and f"source alpha, {folder}/alpha/train-00000.bin, token " in cause
    assert "mixture.py verify" in cure
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_contradicting_launcher_variables_are_bad_input(tmp_path: Path) -> None:
    (ended,) = train(tmp_path / "x", variables={"RANK": "0", "WORLD_SIZE": "2"})
    cause, cure = cause_and_cure([ended])
    assert "MASTER_ADDR" in cause and "all four" in cure


def test_bad_input_is_found_before_torch_is_loaded(tmp_path: Path, corpus: Path) -> None:
    started = tmp_path / "started"
    assert train(started, "training.steps=1")[0].status == 0
    cases = [
        [*SMALL, f"run.root={tmp_path}", f"run.name={started.name}", *overrides]
        for overrides in (
            *(overrides for overrides, ranks, *_ in BAD_INPUTS.values() if ranks == 1),
            ["parallel.tp=2"], ["run.seed=7"],
        )
    ]  # fmt: skip
    listed = repr(cases).replace("CORPUS", str(corpus))
    code = (
        f"import sys\nfrom gpt4moe.train import main\nassert [main(case) for case in {listed}] == [2] * {len(cases)}\n"
        "print({'torch', 'megatron', 'deepspeed', 'wandb'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=outside(), check=False
    )
    assert (result.returncode, result.stdout) == (0, "set()\n"), result.stderr
    assert len(result.stderr.splitlines()) == 2 * len(cases)
