"""slurm/generate.sh and slurm/evaluate.sh on a real Slurm: around a stand-in that starts at once, and the programs."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.inference.tool import TOOL, generate
from tests.numbered_lines import VOCABULARY, numbered_lines
from tests.slurm_lab.cluster import SlurmLab, until
from tests.training.command import train

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("generate", "evaluate")


@pytest.fixture
def tools(checkout: Path) -> Path:
    """The checkout, with stand-ins for both programs; its jobs may start twice."""
    (checkout / "tools").mkdir()
    for script in SCRIPTS:
        shutil.copy(ROOT / "tests" / "slurm" / "stand_in.py", checkout / "tools" / f"{script}.py")
    prologue = checkout / "slurm" / "prologue.sh"
    prologue.write_text(prologue.read_text().replace("most_restarts=20", "most_restarts=1"))
    return checkout


@pytest.mark.parametrize(
    ("script", "signal"),
    [
        ("generate", ("--batch", "--signal=USR1")),  # as --signal=B:USR1@60 before the time limit: ranks are killed
        ("evaluate", ("--signal=TERM",)),  # as a preemption: ranks end with 85
    ],
)
def test_a_stopped_job_goes_back_into_the_queue_and_on(
    script: str, signal: tuple[str, ...], slurm: SlurmLab, tools: Path
) -> None:
    arguments = ["signal=85", "--output=answers"]
    job = slurm.submit("bash", f"slurm/{script}.sh", "--nodes=2", "--ntasks=4", *arguments, cwd=tools)
    until(lambda: len(list(tools.glob("pid-*"))) == 4)
    slurm.call("scancel", *signal, str(job))
    assert slurm.wait(job, 40, "PENDING", "FAILED")["Restarts"] == "1", (tools / f"{script}-{job}.log").read_text()
    slurm.start_again(job)
    ended = slurm.wait(job, 60)
    assert (ended["JobState"], ended["NumTasks"], ended["TimeLimit"]) == ("COMPLETED", "4", "00:07:00")
    assert len(list(tools.glob("rank-1-*.json"))) == 4
    assert f"Job {job}, start 1, ended with 0." in (tools / f"{script}-{job}.log").read_text()


def test_a_job_that_dies_again_and_again_is_given_up_and_bad_input_ends_it_at_once(
    slurm: SlurmLab, tools: Path
) -> None:
    dying, wrong = (
        slurm.submit("sbatch", "--ntasks=2", "slurm/generate.sh", f"end={end}", "--output=answers", cwd=tools)
        for end in (-9, 2)
    )
    ended = slurm.wait(wrong, 30)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    until(lambda: slurm.job(dying)["Restarts"] == "1")
    slurm.wait(dying, 30, "PENDING")
    slurm.start_again(dying)
    ended = slurm.wait(dying, 60)
    log = (tools / f"generate-{dying}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "1"), log
    assert "start 1, ended with 137: rank" in log and "It has started 2 times" in log
    assert not list(tools.glob("*.failed"))


def test_a_cancelled_job_stays_out_of_the_queue(slurm: SlurmLab, tools: Path) -> None:
    job = slurm.submit("sbatch", "--ntasks=1", "slurm/evaluate.sh", "signal=85", "--output=answers", cwd=tools)
    until(lambda: (tools / "pid-0").exists())
    slurm.call("scancel", str(job))
    assert slurm.wait(job, 40)["JobState"] == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_that_would_lose_work_are_refused_before_a_job_waits(
    script: str, slurm: SlurmLab, tools: Path
) -> None:
    answer = slurm.call("bash", f"slurm/{script}.sh", "--nodes=2", "runs/x", "--tp", "2", cwd=tools)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == [
        "--output is missing: a stopped job would begin again.", "Add --output answers.jsonl.",
    ]  # fmt: skip
    answer = slurm.call("bash", f"slurm/{script}.sh", "--tp=2", "runs/x", "--output=a", cwd=tools, SLURM_JOB_ID="1")
    assert answer.returncode == 2 and answer.stderr.startswith("--tp=2 came before FOLDER.\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; `data` beside it has its data, `prompts.jsonl` 30 prompts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    numbered_lines(folder / "data")
    text = ("data.kind=indexed", f"data.path={folder}/data", f"model.vocab_size={VOCABULARY}", "model.init_std=0.3")
    (ended,) = train(
        folder / "run", "model.num_attention_heads=4", "model.num_query_groups=2", *text, "training.steps=1"
    )
    assert ended.status == 0, ended.err
    lines = [json.dumps({"prompt": f"word {number} and"}) + "\n" for number in range(30)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder / "run"


def submit(slurm: SlurmLab, log: Path, script: str, *arguments: object) -> int:
    """On two nodes x two ranks, tp 2 x pp 2."""
    return slurm.submit(
        "sbatch", "--nodes=2", "--ntasks-per-node=2", f"--output={log}", f"slurm/{script}.sh", *map(str, arguments),
        "--tp", "2", "--pp", "2", cwd=ROOT, GPT4MOE_VENV=sys.prefix,
    )  # fmt: skip


def test_a_stopped_generation_goes_on_where_it_was(slurm: SlurmLab, run: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "answers.jsonl", tmp_path / "log"
    arguments = (run, "--input", run.parent / "prompts.jsonl", "--tokens", 24, "--seed", 3)
    job = submit(slurm, log, "generate", *arguments, "--max-rows", 1, "--output", out)
    until(lambda: out.exists() and out.read_bytes().count(b"\n") > 2, 120)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))  # what Slurm sends before the time limit
    assert slurm.wait(job, 60, "PENDING", "COMPLETED", "FAILED")["Restarts"] == "1", log.read_text()
    kept = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 2 < len(kept) < 30
    slurm.start_again(job)
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", log.read_text()
    lines = out.read_bytes().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    (alone,) = generate(*arguments, "--json")
    texts = [(one["id"], one["text"]) for one in json.loads(alone.out)]
    assert [(one["id"], one["text"]) for one in map(json.loads, lines)] == texts


def test_an_evaluation_goes_on_where_it_was(slurm: SlurmLab, run: Path, tmp_path: Path) -> None:
    choices, alone, out, log = (tmp_path / name for name in ("choices.jsonl", "alone.jsonl", "out.jsonl", "log"))
    choices.write_text('{"prompt": "word 3 and ", "choices": ["9 other", "0"], "answer": 0}\n' * 3)
    arguments = (run, "--choices", choices, "--data", run.parent / "data", "--json", "--output")
    (ended,) = generate(*arguments, alone, tool=TOOL.with_name("evaluate.py"))
    assert ended.status == 0, ended.err
    whole = alone.read_text().splitlines(keepends=True)
    assert len(whole) == 4
    out.write_text("".join(whole[:2]) + whole[2][:9])  # as a killed job leaves it
    shutil.copy(tmp_path / "alone.jsonl.settings.json", tmp_path / "out.jsonl.settings.json")
    job = submit(slurm, log, "evaluate", *arguments, out)
    assert slurm.wait(job, 300)["JobState"] == "COMPLETED", log.read_text()
    assert out.read_text().splitlines(keepends=True)[:2] == whole[:2]
    (results,) = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    wanted = json.loads(ended.out)
    assert results["choices"] == wanted["choices"]
    assert results["sources"][0]["loss"] == pytest.approx(wanted["sources"][0]["loss"], abs=1e-5)
    assert results["sources"][0]["tokens"] == wanted["sources"][0]["tokens"]
