"""tools/generate.py: the same text from every format and layout; files that are resumed; chats; bad input."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from tests.inference.tool import TOOL, generate, torchrun
from tests.numbered_lines import numbered_lines
from tests.slurm_lab.cluster import until
from tests.training.command import outside, train

DRAWN = ("--temperature", "1.0", "--top-p", "0.9", "--tokens", "9", "--seed", "4")
PROMPTS = ("word 17 and", "other", "and 100 other things", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; its export is in `hf`, its rank files for tp 2 x pp 2 in `served`."""
    data = numbered_lines(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.3", "model.num_layers=3")
    text = ("data.kind=indexed", f"data.path={data}", "model.vocab_size=300", "training.steps=1")
    (ended,) = train(folder, *model, *text)
    assert ended.status == 0, ended.err
    to_huggingface(folder, folder / "hf", dtype="fp32")
    to_inference_layout(folder, folder / "served", tp=2, pp=2, dtype="fp32")
    (folder / "hf" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    )
    return folder


def _texts(*arguments: object, ranks: int = 1) -> list[dict[str, Any]]:
    ended = generate(*arguments, "--json", ranks=ranks)
    assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
    assert all(rank.out == "" for rank in ended[1:])
    found: list[dict[str, Any]] = json.loads(ended[0].out)
    return found


@pytest.fixture(scope="module")
def wanted(run: Path) -> list[dict[str, Any]]:
    return _texts(run, "--prompt", *PROMPTS, *DRAWN)


def _prompts(path: Path) -> Path:
    lines = [json.dumps({"id": f"p{at}", "prompt": prompt}) for at, prompt in enumerate(PROMPTS)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("folder", "layout", "ranks"),
    [
        (".", ("--tp", 2, "--ep", 2), 2), (".", ("--pp", 2), 4), ("hf", (), 1), ("hf", ("--pp", 2, "--ep", 2), 4),
        ("served", ("--tp", 2), 2), ("checkpoints/step-00000001", ("--ep", 2), 2),
    ],
)  # fmt: skip
def test_every_format_and_layout_gives_the_same_sampled_text(
    folder: str, layout: tuple[Any, ...], ranks: int, run: Path, wanted: list[dict[str, Any]]
) -> None:
    found = _texts(run / folder, "--prompt", *PROMPTS, *DRAWN, *layout, ranks=ranks)
    assert [(one["text"], one["tokens"], one["finish_reason"]) for one in found] == [
        (one["text"], one["tokens"], one["finish_reason"]) for one in wanted
    ]
    for one, same in zip(found, wanted, strict=True):
        assert one["logprobs"] == pytest.approx(same["logprobs"], abs=1e-4)
    assert len({one["text"] for one in wanted}) == len(PROMPTS)


def test_a_prompt_alone_gives_the_text_it_gives_among_others(run: Path, wanted: list[dict[str, Any]]) -> None:
    (alone,) = _texts(run, "--prompt", PROMPTS[2], *DRAWN)
    assert alone["tokens"] == wanted[2]["tokens"]


def test_samples_of_a_prompt_differ_and_the_first_is_the_only_one(run: Path, wanted: list[dict[str, Any]]) -> None:
    samples = _texts(run, "--prompt", PROMPTS[0], *DRAWN, "--num-samples", 4)
    assert [one["sample"] for one in samples] == [0, 1, 2, 3]
    assert samples[0]["tokens"] == wanted[0]["tokens"] and len({one["text"] for one in samples}) == 4


def test_the_terminal_gets_each_prompt_with_its_text(run: Path, wanted: list[dict[str, Any]]) -> None:
    (ended,) = generate(run, "--prompt", *PROMPTS, *DRAWN)
    assert ended.out == "".join(
        f"--- {prompt!r}\n{prompt}{one['text']}\n" for prompt, one in zip(PROMPTS, wanted, strict=True)
    )


def test_a_text_ends_before_a_stop_string(run: Path, wanted: list[dict[str, Any]]) -> None:
    stop = wanted[0]["text"][2:4]
    (stopped,) = _texts(run, "--prompt", PROMPTS[0], *DRAWN, "--stop", stop)
    assert stopped["text"] == wanted[0]["text"][: wanted[0]["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    (ended,) = generate(run, "--prompt", PROMPTS[0], *DRAWN, "--stop", stop)
    assert ended.out == f"--- {PROMPTS[0]!r}\n{PROMPTS[0]}{stopped['text']}\n"


@pytest.mark.parametrize("kept", ["", "half a line", "two lines and a torn one", "all"])
def test_a_file_of_answers_is_resumed_without_loss_or_doubles(
    kept: str, run: Path, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    source, out = _prompts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    arguments = (run, "--input", source, "--output", out, *DRAWN)
    ((ended),) = generate(*arguments)
    assert ended.status == 0, ended.err
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(
        {"": b"", "half a line": lines[0][:9], "two lines and a torn one": b"".join(lines[:2]) + lines[2][:-1],
         "all": whole}[kept]
    )  # fmt: skip
    ((again),) = generate(*arguments, "--max-rows", 2)
    assert again.status == 0, again.err
    answers = [json.loads(line) for line in lines]
    resumed = [json.loads(line) for line in out.read_text().splitlines()]
    for one, first in zip(resumed, answers, strict=True):
        assert one.pop("logprobs") == pytest.approx(first["logprobs"], abs=1e-5)  # other rows were in the batch
        assert one == {key: value for key, value in first.items() if key != "logprobs"}
    assert [one["id"] for one in answers] == [f"p{at}" for at in range(len(PROMPTS))]
    assert [one["text"] for one in answers] == [one["text"] for one in wanted]
    assert answers[0].keys() == {"id", "text", "tokens", "logprobs", "finish_reason"}


def test_answers_of_other_weights_prompts_or_settings_are_not_mixed(run: Path, tmp_path: Path) -> None:
    source, out = _prompts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    beside = tmp_path / "out.jsonl.settings.json"
    changed = tmp_path / "changed.jsonl"
    changed.write_text(source.read_text().replace("word 17", "word 18"))
    (ended,) = generate(run, "--input", source, "--output", out, *DRAWN)
    assert ended.status == 0, ended.err
    whole, settings = out.read_bytes(), beside.read_bytes()
    cases: dict[str, tuple[Any, ...]] = {
        "begun with seed=4; this command has 5": (run, "--input", source, *DRAWN[:-1], 5),
        "begun with stop=[]; this command has ['x']": (run, "--input", source, *DRAWN, "--stop", "x"),
        "begun with prompts=": (run, "--input", changed, *DRAWN),
        "begun with step=1; this command has 0": (run / "hf", "--input", source, *DRAWN),
        "settings.json, which says what they follow from, is missing": (run, "--input", source, *DRAWN),
    }
    for words, arguments in cases.items():
        if "missing" in words:
            beside.write_text("{half")
        (ended,) = generate(*arguments, "--output", out)
        assert ended.status == 2 and words in ended.err and "another --output" in ended.err, (words, ended)
        assert out.read_bytes() == whole
    assert json.loads(settings)["temperature"] == 1.0
    out.unlink()  # settings without answers bind nobody
    (ended,) = generate(run, "--input", source, "--output", out, "--tokens", 1)
    assert ended.status == 0, ended.err


def test_several_copies_write_one_file_in_order(run: Path, wanted: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = (run, "--input", _prompts(tmp_path / "in.jsonl"), "--output", out, *DRAWN, "--max-rows", 1, "--ep", 2)
    ended = generate(*arguments, ranks=2)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [one["text"] for one in wanted]


def test_a_chat_is_put_into_the_folder_s_template(run: Path, tmp_path: Path) -> None:
    (chat,) = _texts(run / "hf", "--chat", "--prompt", "word 17", *DRAWN)
    assert chat["prompt"] == "user: word 17\nassistant:"
    (plain,) = _texts(run / "hf", "--prompt", chat["prompt"], *DRAWN)
    assert plain["tokens"] == chat["tokens"]
    lines = tmp_path / "chats.jsonl"
    lines.write_text(json.dumps({"id": 7, "messages": [{"role": "user", "content": "word 17"}]}) + "\n")
    (read,) = _texts(run / "hf", "--input", lines, *DRAWN)
    assert read["tokens"] == chat["tokens"] and read["id"] == 7


def test_bad_input_is_one_line_of_cause_and_one_of_cure(run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": 1, "prompt": "a"}\n{"id": 2, "text": "b"}\n')
    long = tmp_path / "long.jsonl"
    long.write_text('{"id": "a", "prompt": "a"}\n' + json.dumps({"id": "b", "prompt": "word " * 60}) + "\n")
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x", "text": "a"}\n')
    cases = {
        "the context of 32 is too short": (run, "--prompt", "word " * 60),
        "Prompt 'b' 'word": (run, "--input", long),
        "line 2 has no prompt": (run, "--input", bad),
        "does not divide": (run, "--tp", 2),
        "tp=0 is below 1": (run, "--tp", 0),
        "neither a step folder nor|no folder with weights": (tmp_path,),
        "--temperature -1.0 draws no token": (run, "--temperature", -1),
        "has no chat template": (run, "--chat"),
        "below 1": (run, "--num-samples", 0),
        "invalid int value: 'many'": (run, "--tokens", "many"),
        "is not the answer to prompt": (run, "--input", _prompts(tmp_path / "in.jsonl"), "--output", other),
        "cannot be written": (run, "--output", tmp_path / "nowhere" / "out.jsonl"),
        "no file that can be resumed": (run, "--output", "/dev/full"),
        "is both --input and --output": (run, "--input", bad, "--output", tmp_path / "." / "bad.jsonl"),
        "--json prints answers": (run, "--json", "--output", tmp_path / "out.jsonl"),
        "'\\udcff' is no UTF-8": (run, "--prompt", "a", "\udcff"),
        "Prompt 1 is empty": (run, "--prompt", "a", ""),
        "--cache-gb nan": (run, "--cache-gb", "nan"),
        "--cache-gb inf": (run, "--cache-gb", "inf"),
        "--temperature 1e-320": (run, "--temperature", "1e-320"),
        "--temperature nan": (run, "--temperature", "nan"),
        "--repetition-penalty inf": (run, "--repetition-penalty", "inf"),
    }
    for words, arguments in cases.items():
        (ended,) = generate(*arguments)
        lines = [line for line in ended.err.splitlines() if line.startswith(("error:", "fix:"))]
        assert ended.status == 2 and len(lines) == 2, (words, ended)
        assert any(word in lines[0] for word in words.split("|")), (words, lines)
        assert "Traceback" not in ended.err and ended.out == ""


def test_a_layout_that_does_not_divide_is_refused_on_every_rank(run: Path) -> None:
    ended = generate(run, "--pp", 2, "--tp", 2, ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    assert "does not divide" in ended[0].err and ended[1].err == ""


def test_the_first_rank_alone_tells_what_every_rank_has_after_they_met(run: Path, tmp_path: Path) -> None:
    ended = generate(run, "--output", tmp_path / "nowhere" / "out.jsonl", "--ep", 2, ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    assert "cannot be written" in ended[0].err and "error:" not in ended[1].err


def test_torchrun_ends_when_a_rank_is_killed_and_the_same_command_goes_on(run: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"word {at} and"}) + "\n" for at in range(40)))
    arguments = (run, "--input", source, "--output", out, *DRAWN, "--tokens", 24)
    command = torchrun(TOOL, *arguments, "--tp", 2, "--pp", 2, "--ep", 2, "--max-rows", 1)
    with (tmp_path / "err").open("w") as err:
        launcher = subprocess.Popen(command, env=outside(), stdout=subprocess.DEVNULL, stderr=err)
    until(lambda: out.exists() and out.read_bytes().count(b"\n") > 2, 120)
    ranks = [one for one in psutil.Process(launcher.pid).children() if one.cmdline()[-1] == command[-1]]
    ranks[2].kill()
    assert launcher.wait(60) == 1, "torchrun's own status, whatever a rank's was"
    assert not any(rank.is_running() for rank in ranks) and "exitcode: -9" in (tmp_path / "err").read_text()
    lines = out.read_bytes().splitlines(keepends=True)
    assert 2 < len(lines) < 40
    begun = [json.loads(line) for line in lines if line.endswith(b"\n")]
    (ended,) = generate(*arguments)  # on another layout
    assert ended.status == 0, ended.err
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert whole[: len(begun)] == begun and [one["id"] for one in whole] == list(range(1, 41))
    alone = _texts(run, "--input", source, *DRAWN, "--tokens", 24)
    assert [one["tokens"] for one in whole] == [one["tokens"] for one in alone]


def test_torchrun_tells_bad_input_once_and_a_rank_ends_with_2(run: Path) -> None:
    command = torchrun(TOOL, run, "--tp", 3, ranks=2)
    ended = subprocess.run(command, env=outside(), capture_output=True, text=True, timeout=120, check=False)
    told = [line.partition(":")[0] for line in ended.stderr.splitlines() if line.startswith(("error:", "fix:"))]
    assert (told, ended.stdout, ended.returncode) == (["error", "fix"], "", 1), ended.stderr
    assert ended.stderr.count("exitcode  : 2") == 2, ended.stderr


def test_a_signal_ends_the_command_with_85(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(TOOL), str(run), "--output", str(out), "--num-samples", "1000", "--max-rows", "1"]
    process = subprocess.Popen(command, env=outside(), stderr=subprocess.DEVNULL)
    until(lambda: out.exists() and out.read_bytes().count(b"\n") > 2, 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 85
    assert all(json.loads(line)["id"] == 0 for line in out.read_text().splitlines(keepends=True) if line[-1] == "\n")


@pytest.mark.parametrize(
    ("end", "why"), [("| head -c 1", "broken pipe"), ("> /dev/full", "no space"), (">&-", "bad file")]
)
def test_a_stdout_that_takes_no_more_ends_with_a_message(run: Path, end: str, why: str) -> None:
    command = f"{sys.executable} {TOOL} {run} --prompt a b c d --max-rows 1 --tokens 20 {end}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-2].startswith("error: stdout was closed") and why in lines[-2] and lines[-1].startswith("fix:"), (
        done.stderr
    )
    assert "Traceback" not in done.stderr
