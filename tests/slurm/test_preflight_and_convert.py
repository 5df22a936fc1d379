"""slurm/preflight.sh and slurm/convert.sh on a real Slurm: the programs, and a conversion that is stopped."""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.test_train import SMALL
from tests.slurm_lab.cluster import SlurmLab
from tests.training.command import train

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
# Stands for tools/convert_checkpoint.py: the first start waits for a signal, a restart ends at once.
SLEEPER = """
import json, os, pathlib, sys, time
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
note = pathlib.Path(f"start-{restart}.json")
note.with_suffix(".part").write_text(json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ)}))
note.with_suffix(".part").rename(note)
time.sleep(0 if restart else 90)
"""


def test_preflight_finds_two_nodes_fit_and_measures_between_them(slurm: SlurmLab, tmp_path: Path) -> None:
    log = tmp_path / "preflight.log"
    job = slurm.submit(
        "sbatch", "--nodes=2", "--ntasks-per-node=2", "--time=20", f"--output={log}", "slurm/preflight.sh",
        *SMALL, "parallel=tp2_pp2_ep2", f"run.root={tmp_path}/runs", "output=json", cwd=ROOT, GPT4MOE_VENV=sys.prefix,
    )  # fmt: skip
    ended = slurm.wait(job, 200)
    text = log.read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), text
    report = json.loads(text[text.index("\n{\n") : text.rindex("\n}") + 2])
    checks = {check["name"]: check for check in report["checks"]}
    assert report["nodes"] == ["node1", "node2"]
    assert checks["placement"]["measured"] == "nodes of a group: tp 1, ep 1, pp 2"
    assert checks["first checkpoint"]["expected"] == "before the time limit of 20 min"
    assert "the slowest of 2" in checks["node links"]["measured"]
    assert {name for name, check in checks.items() if check["status"] == "failed"} == set()
    assert list((tmp_path / "runs").iterdir()) == []


def test_preflight_of_a_layout_that_does_not_fit_ends_with_1(slurm: SlurmLab, tmp_path: Path) -> None:
    log = tmp_path / "preflight.log"
    job = slurm.submit(
        "sbatch", "--ntasks=1", f"--output={log}", "slurm/preflight.sh", *SMALL, "parallel.tp=2",
        f"run.root={tmp_path}/runs", cwd=ROOT, GPT4MOE_VENV=sys.prefix,
    )  # fmt: skip
    assert slurm.wait(job, 100)["ExitCode"] == "1:0", log.read_text()
    assert "NOT FIT TO RUN" in log.read_text()


def test_convert_writes_a_folder_for_serving(slurm: SlurmLab, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "served"
    assert train(run, "training.steps=1")[0].status == 0
    job = slurm.submit(
        "bash", "slurm/convert.sh", f"--output={tmp_path}/convert.log", "to-inference", str(run), str(out), "--tp", "2",
        "--pp", "1", cwd=ROOT, GPT4MOE_VENV=sys.prefix,
    )  # fmt: skip
    ended = slurm.wait(job, 100)
    assert (ended["JobState"], ended["NumTasks"]) == ("COMPLETED", "1"), (tmp_path / "convert.log").read_text()
    assert len(list(out.glob("*.safetensors"))) == 2


def test_a_stopped_conversion_goes_back_into_the_queue_and_on(slurm: SlurmLab, checkout: Path) -> None:
    (checkout / "tools").mkdir()
    (checkout / "tools" / "convert_checkpoint.py").write_text(SLEEPER)
    job = slurm.submit("sbatch", "slurm/convert.sh", "to-hf", "runs/x", "out", "--max-shard-size", "5GB", cwd=checkout)
    deadline = time.monotonic() + 30
    while not (checkout / "start-0.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # As a preemption does where the site lets it tell the batch shell too: no cancellation.
    slurm.call("scancel", "--batch", "--signal=TERM", str(job))
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))  # what --signal=B:USR1@60 sends
    assert slurm.wait(job, 30, "PENDING")["Restarts"] == "1"
    slurm.start_again(job)
    assert slurm.wait(job, 60)["JobState"] == "COMPLETED"
    first, second = (json.loads((checkout / f"start-{start}.json").read_text()) for start in (0, 1))
    assert first["argv"] == second["argv"] == ["to-hf", "runs/x", "out", "--max-shard-size", "5GB"]


def test_convert_asks_for_no_gpu_and_goes_to_the_partition_for_it(slurm: SlurmLab, checkout: Path) -> None:
    (checkout / "tools").mkdir()
    (checkout / "tools" / "convert_checkpoint.py").write_text(SLEEPER.replace("90", "0"))
    with (checkout / "slurm" / "cluster.env").open("a") as site:
        site.write("export SBATCH_GPUS_PER_NODE=8\ncpu_partition=urgent\n")
    job = slurm.submit("bash", "slurm/convert.sh", "--cpus-per-task=2", "verify", "a", "b", cwd=checkout)
    ended = slurm.wait(job, 30)
    assert (ended["JobState"], ended["Partition"], ended["NumNodes"]) == ("COMPLETED", "urgent", "1")
    seen = json.loads((checkout / "start-0.json").read_text())["environment"]
    assert "SLURM_GPUS_PER_NODE" not in seen
    assert seen["SRUN_CPUS_PER_TASK"] == "2"


@pytest.mark.parametrize("script", ["preflight", "convert", "generate", "evaluate"])
def test_the_headers_leave_gpus_and_partition_to_the_site(script: str) -> None:
    text = (ROOT / f"slurm/{script}.sh").read_text()
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert not [line for line in header if any(word in line for word in ("gpu", "gres", "partition"))]
