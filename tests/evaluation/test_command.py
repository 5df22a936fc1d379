"""tools/evaluate.py: the same numbers on every layout as transformers' on the export; resumed answers; bad input."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.evaluation.pieces import encode_pair, windows
from gpt4moe.inference.logits import load_strictly
from gpt4moe.parallel.environment import Environment
from tests.data.conftest import shard
from tests.inference.tool import TOOL, generate, torchrun
from tests.numbered_lines import VOCABULARY, numbered_lines
from tests.spawn import run_ranks
from tests.training.command import Ended, outside, train

evaluate = partial(generate, tool=TOOL.with_name("evaluate.py"))
LAYOUTS: dict[str, tuple[str, tuple[Any, ...], int]] = {
    "tp2": (".", ("--tp", 2), 2), "pp2": (".", ("--pp", 2), 2),
    "tp2-pp2-ep2": (".", ("--tp", 2, "--pp", 2, "--ep", 2), 4),
    "etp2, copies": (".", ("--etp", 2), 4), "hf": ("hf", ("--ep", 2), 2), "to-inference": ("served", (), 1),
}  # fmt: skip
QUESTIONS = [
    {"prompt": f"word {number} and ", "choices": [f"{number * number} other", "0", f"{number + 1} things", "9 word"],
     "answer": number % 4}
    for number in range(3, 11)
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; its export is in `hf`, its rank files in `served`; the data of two sources in `data`."""
    data = numbered_lines(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.3", "model.num_layers=4")
    text = ("data.kind=indexed", f"data.path={data}", f"model.vocab_size={VOCABULARY}", "training.steps=1")
    (ended,) = train(folder, *model, *text)
    assert ended.status == 0, ended.err
    to_huggingface(folder, folder / "hf", dtype="fp32")
    to_inference_layout(folder, folder / "served", tp=2, pp=2, dtype="fp32")
    texts = {"lines": [f"word {i} and {3 * i} things\n" for i in range(30)], "cafés": ["un café noir, déjà vu\n"] * 9}
    sources = {
        name: SourceText(train=some, valid=some, licence="CC0-1.0", description="") for name, some in texts.items()
    }
    write_data_folder(folder / "data", sources, data / "tokenizer.json", lambda amount: None)
    lines = [{"text": text, "source": name} for name, some in texts.items() for text in ("".join(some), some[0])]
    _write(folder / "texts.jsonl", [*lines, {"text": "no source"}])
    _write(folder / "choices.jsonl", QUESTIONS)
    return folder


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def _json(*arguments: object, ranks: int = 1) -> dict[str, Any]:
    ended: list[Ended] = evaluate(*arguments, "--json", ranks=ranks)
    assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
    assert all(rank.out == "" for rank in ended[1:])
    found: dict[str, Any] = json.loads(ended[0].out)
    return found


def _questions(run: Path, out: Path) -> tuple[Any, ...]:
    return ("--choices", run / "choices.jsonl", "--exact", run / "exact.jsonl", "--tokens", 6, "--output", out)


@pytest.fixture(scope="module")
def wanted(run: Path) -> dict[str, Any]:
    """In one process: of the data folder, with questions; of the jsonl in `texts`; `answers`."""
    exact = [{"id": f"q{at}", "prompt": f"word {at} and", "answer": "?"} for at in range(3)]
    _write(run / "exact.jsonl", exact)
    _json(run, "--exact", run / "exact.jsonl", "--tokens", 6, "--output", run / "first.jsonl")
    said = [json.loads(line)["text"] for line in (run / "first.jsonl").read_text().splitlines()]
    # The model's own words are the right answers to two questions.
    exact[0]["answer"], exact[1]["answer"] = said[0], ["no", said[1]]  # type: ignore[assignment]
    _write(run / "exact.jsonl", exact)
    found = _json(run, "--data", run / "data", *_questions(run, run / "answers.jsonl"))
    found["answers"] = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    found["texts"] = _json(run, "--data", run / "texts.jsonl")["sources"]
    return found


def _same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], close: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for one, right in zip(found, wanted, strict=True):
        assert one.keys() == right.keys()
        for name, value in right.items():
            if isinstance(value, float) or name == "loglikelihoods":
                assert one[name] == pytest.approx(value, rel=close, abs=close), name
            else:
                assert one[name] == value, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_numbers_are_the_same_on_every_layout(name: str, run: Path, wanted: dict[str, Any], tmp_path: Path) -> None:
    folder, layout, ranks = LAYOUTS[name]
    out = tmp_path / "answers.jsonl"
    found = _json(run / folder, "--data", run / "data", *_questions(run, out), *layout, ranks=ranks)
    _same(found["sources"], wanted["sources"])
    assert (found["choices"], found["exact"]) == (wanted["choices"], wanted["exact"])
    _same([json.loads(line) for line in out.read_text().splitlines()], wanted["answers"])
    if name == "tp2-pp2-ep2":
        _same(_json(run / folder, "--data", run / "texts.jsonl", *layout, ranks=ranks)["sources"], wanted["texts"])


@torch.no_grad()
def _theirs(environment: Environment, run: Path) -> dict[str, Any]:
    """transformers' numbers, one piece after the other."""
    model, tokenizer = load_strictly(run / "hf").model, load_tokenizer(run / "data" / "tokenizer.json")

    def total(tokens: list[int], num_scored: int) -> float:
        logits = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].float()
        found = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])
        return float(found[-num_scored:].double().sum())

    nats, counts = {}, {}
    for source in ("lines", "cafés"):
        stream = shard(run / "data", source, "valid").tokens.tolist()
        nats[source] = -sum(total(piece.tokens, piece.num_scored) for piece in windows(stream, 32))
        counts[source] = len(stream) - 1
    choices = []
    for question in QUESTIONS:
        pairs = [encode_pair(tokenizer.encode, str(question["prompt"]), choice) for choice in question["choices"]]  # type: ignore[attr-defined]
        choices.append([total([*before, *after], len(after)) for before, after in pairs])
    texts = []
    for at in range(3):
        prompt = torch.tensor([tokenizer.encode(f"word {at} and")])
        out = model.generate(prompt, do_sample=False, max_new_tokens=6, eos_token_id=tokenizer.eos_id, pad_token_id=0,
                             attention_mask=torch.ones_like(prompt))  # fmt: skip
        texts.append(tokenizer.decode([token for token in out[0, prompt.shape[1] :].tolist() if token]))
    return {"nats": nats, "counts": counts, "choices": choices, "texts": texts}


def test_the_numbers_are_those_of_transformers_on_the_export(run: Path, wanted: dict[str, Any]) -> None:
    (theirs,) = run_ranks(1, _theirs, run)
    for one in wanted["sources"][:2]:
        assert one["tokens"] == theirs["counts"][one["source"]]
        assert one["loss"] == pytest.approx(theirs["nats"][one["source"]] / one["tokens"], abs=1e-4)
    choices = [line for line in wanted["answers"] if line["kind"] == "choices"]
    for line, right in zip(choices, theirs["choices"], strict=True):
        assert line["loglikelihoods"] == pytest.approx(right, abs=1e-4)
        assert line["chosen"] == right.index(max(right))
    said = [line["text"] for line in wanted["answers"] if line["kind"] == "exact"]
    assert said == [text.strip() for text in theirs["texts"]]


def test_sums_and_shares_follow_from_the_answers(run: Path, wanted: dict[str, Any]) -> None:
    *parts, all_ = wanted["sources"]
    assert [one["source"] for one in wanted["sources"]] == ["cafés", "lines", "all"]
    for name in ("tokens", "bytes", "right_tokens"):
        assert all_[name] == sum(one[name] for one in parts)
    for one in wanted["sources"]:
        assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
        assert one["bits_per_byte"] == pytest.approx(one["loss"] * one["tokens"] / math.log(2) / one["bytes"])
    texts = {one["source"]: one["bytes"] for one in wanted["texts"]}
    assert texts["texts"] == len("no source")
    # The first token of a stream is not scored: "w" of "word", or "u" of "un"; documents are 30 lines and 9.
    assert 0 < texts["cafés"] - len("un café noir, déjà vu\n".encode()) - parts[0]["bytes"] <= 4
    choices, exact = wanted["choices"], wanted["exact"]
    lines = [line for line in wanted["answers"] if line["kind"] == "choices"]
    assert choices["questions"] == len(QUESTIONS) and choices["right"] == sum(line["is_right"] for line in lines)
    assert choices["accuracy"] == choices["right"] / len(QUESTIONS)
    for line, question in zip(lines, QUESTIONS, strict=True):
        per_character = [
            total / len(choice)
            for total, choice in zip(line["loglikelihoods"], question["choices"], strict=True)  # type: ignore[call-overload]
        ]
        assert line["chosen_normalised"] == per_character.index(max(per_character))
    assert exact == {"questions": 3, "right": 2, "exact_match": 2 / 3}
    assert len({line["chosen"] for line in lines}) > 1


@pytest.mark.parametrize("kept", [5, len(QUESTIONS) + 4])
def test_what_is_finished_is_resumed_and_the_results_are_of_all(
    kept: int, run: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """Among the questions; after the first of two sources."""
    out = tmp_path / "answers.jsonl"
    shutil.copy(run / "answers.jsonl.settings.json", tmp_path)
    whole = (run / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(whole) == len(QUESTIONS) + 5
    # A number that no model gives shows that the line was taken from the file.
    first = json.loads(whole[0]) | {"loglikelihoods": [-1.0] * 4}
    out.write_text("".join([json.dumps(first) + "\n", *whole[1:kept]]) + whole[kept][:7])
    found = _json(run, "--data", run / "data", *_questions(run, out))
    assert {name: found[name] for name in ("choices", "exact")} == {name: wanted[name] for name in ("choices", "exact")}
    _same(found["sources"], wanted["sources"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0] == first
    _same(lines[1:], wanted["answers"][1:])


def test_lines_of_other_questions_or_data_are_not_mixed(run: Path, tmp_path: Path) -> None:
    out = run / "answers.jsonl"
    whole = out.read_bytes()
    other = shutil.copytree(run / "data", tmp_path / "data")
    texts = SourceText(train=["a\n"], valid=["other lines\n"], licence="CC0-1.0", description="")
    write_data_folder(other, {"lines": texts}, other / "tokenizer.json", lambda amount: None)
    for changed, words in ((("--max-tokens", 9), "max_tokens=None; this"), (("--data", other), "data=")):
        (ended,) = evaluate(run, "--data", run / "data", *_questions(run, out), *changed)
        assert ended.status == 2 and f"was begun with {words}" in ended.err, ended
    assert out.read_bytes() == whole


def test_torchrun_s_stdout_is_json_alone_and_equal(run: Path, wanted: dict[str, Any]) -> None:
    layout = ("--tp", 2, "--pp", 2, "--ep", 2, "--json")
    command = torchrun(TOOL.with_name("evaluate.py"), run, "--data", run / "texts.jsonl", *layout)
    ended = subprocess.run(command, env=outside(), capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    _same(json.loads(ended.stdout)["sources"], wanted["texts"])


def test_people_get_a_table(run: Path, wanted: dict[str, Any]) -> None:
    (ended,) = evaluate(run, "--data", run / "data", *_questions(run, run / "answers.jsonl")[:-2], "--max-tokens", 100)
    assert ended.status == 0, ended.err
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0] == ["source", "tokens", "bytes", "loss", "perplexity", "bits", "per", "byte"]
    assert [row[:2] for row in rows[1:4]] == [["cafés", "100"], ["lines", "100"], ["all", "200"]]
    assert f"{100 * wanted['choices']['accuracy']:.2f}" in ended.out and "66.67 %" in ended.out


def test_bad_input_is_one_line_of_cause_and_one_of_cure(run: Path, tmp_path: Path) -> None:
    def file(name: str, content: str) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(content)
        return path

    good = '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n'
    long = "word " * 60
    cases: dict[str, tuple[Any, ...]] = {
        "Nothing to evaluate": (run,),
        "line 2 is no JSON": (run, "--choices", file("a", good + "{half\n")),
        "line 1 is no JSON object": (run, "--exact", file("b", "[1]\n")),
        "line 1 has no 'answer'": (run, "--exact", file("c", '{"prompt": "a"}\n')),
        "has choices='b', of a wrong kind": (run, "--choices", file("d", good.replace('["b", "c"]', '"b"'))),
        "is empty": (run, "--choices", file("e", "\n")),
        "has answer 2, which is none of its 2 choices": (run, "--choices", file("f", good.replace("0", "2"))),
        "has answer 'x', which": (run, "--choices", file("g", good.replace("0", '"x"'))),
        "the context takes 33": (run, "--choices", file("h", good.replace('"a"', f'"{long}"'))),
        "the context takes 31": (run, "--exact", file("i", json.dumps({"prompt": long, "answer": "b"}))),
        "has no text": (run, "--data", file("j", '{"text": ""}\n')),
        "cannot be read": (run, "--data", tmp_path / "none.jsonl"),
        "below 1": (run, "--data", run / "data", "--max-tokens", 0),
        "cannot be written": (run, "--data", run / "data", "--output", tmp_path / "nowhere" / "out.jsonl"),
        **({} if find_spec("lm_eval") else {"which is not installed": (run, "--tasks", "any")}),
        "does not divide": (run, "--data", run / "data", "--tp", 2),
        "is missing or damaged": (run, "--choices", file("k", good), "--output", file("l", '{"id": 1}\n')),
        "half of a surrogate pair": (run, "--exact", file("m", '{"prompt": "\\ud800", "answer": "b"}\n')),
        "has the id 7 twice": (run, "--choices", file("n", 2 * good.replace("{", '{"id": 7, ', 1))),
        "line 1 is no JSON": (run, "--data", file("o", "[" * 100_000)),
        "has a vocabulary of 280, the model one of 300": (run, "--data", _other_vocabulary(tmp_path / "other")),
    }
    for words, arguments in cases.items():
        (ended,) = evaluate(*arguments)
        lines = [line for line in ended.err.splitlines() if line.startswith(("error:", "fix:"))]
        assert ended.status == 2 and len(lines) == 2, (words, ended)
        assert words in lines[0], (words, lines)
        assert "Traceback" not in ended.err and ended.out == ""


def test_stdout_has_json_alone_in_a_process_of_its_own(run: Path) -> None:
    command = [sys.executable, TOOL.with_name("evaluate.py"), run, "--data", run / "data", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout)["sources"][0]["source"] == "cafés"


def test_a_broken_pipe_ends_with_a_message(run: Path) -> None:
    command = f"{sys.executable} {TOOL.with_name('evaluate.py')} {run} --data {run / 'data'} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-2].startswith("error: stdout was closed") and lines[-1].startswith("fix:"), done.stderr


def _other_vocabulary(folder: Path) -> Path:
    from gpt4moe.data.tokenizer import train_tokenizer

    texts = [f"word {i} and {i * i} other things\n" for i in range(50)]
    folder.mkdir()
    train_tokenizer(texts, vocab_size=280).backend.save(str(folder / "tokenizer.json"))
    source = SourceText(train=texts, valid=texts, licence="CC0-1.0", description="")
    write_data_folder(folder, {"alpha": source}, folder / "tokenizer.json", lambda amount: None)
    return folder
