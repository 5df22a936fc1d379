"""launch_ranks: whatever happens to which rank, the status is the cause's and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gpt4moe.parallel import forked_ranks
from gpt4moe.parallel.rank_processes import Ranks, start_ranks

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
rank, here = int(os.environ["RANK"]), Path(os.environ["HERE"])
def hear(number, frame):
    with open(here / f"heard-{rank}", "a") as file:
        file.write(signal.Signals(number).name + " ")
def touch(name):
    (here / f"{name}-{rank}").touch()
"""


ASKED = "SIGINT: handed to the ranks, to end in their own way. Those that still run in 600 s are killed"


def launcher(here: Path, body: str, ranks: int = 2, *more: str) -> subprocess.Popen[str]:
    program = here / "program.py"
    program.write_text(PROGRAM + body)
    command = [sys.executable, "-m", "gpt4moe.launch_ranks", "--nproc-per-node", str(ranks), *more, str(program), "a=b"]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "HERE": str(here)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(here: Path, body: str, ranks: int = 2) -> tuple[int, str, str]:
    process = launcher(here, body, ranks)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def all_there(here: Path, name: str, ranks: int = 2) -> None:
    deadline = time.monotonic() + 120
    while len(list(here.glob(f"{name}-*"))) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_get_what_torchrun_would_set(tmp_path: Path) -> None:
    body = (
        "own = [os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')]\n"
        "os.write(1, (' '.join([*own, *sys.argv[1:], os.environ['MASTER_PORT']]) + '\\n').encode())"
    )
    status, out, err = ended(tmp_path, body)
    (*first, port), (*second, same_port) = (line.split() for line in sorted(out.splitlines()))
    assert (status, err) == (0, "")
    assert (first, second) == (["0", "0", "2", "2", "127.0.0.1", "a=b"], ["1", "1", "2", "2", "127.0.0.1", "a=b"])
    assert port == same_port


@pytest.mark.parametrize("status", [1, 2, 85])
def test_the_status_is_that_of_the_rank_that_failed_and_nothing_is_added(status: int, tmp_path: Path) -> None:
    body = f"if rank == 1: print('why', file=sys.stderr); sys.exit({status})\ntime.sleep(60)"
    assert ended(tmp_path, body) == (status, "", "why\n")


def test_a_killed_rank_is_named_and_counts_before_one_that_failed_for_it(tmp_path: Path) -> None:
    body = """
if rank == 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if rank == 1:
    (here / "dies").write_text(str(os.getpid()))
    touch("dies")
    os.kill(os.getpid(), 9)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while not (here / "dies-1").exists():
    time.sleep(0.01)
try:  # before rank 1 is dead, the end of this rank would be a TERM for it
    while Path("/proc", (here / "dies").read_text(), "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
except OSError:
    pass  # the launcher has seen it
sys.exit(1)
"""
    began = time.monotonic()
    status, _, err = ended(tmp_path, body, ranks=3)
    assert status == 137
    assert err.splitlines() == [
        "error: Rank 1 was killed by SIGKILL, as the system does when memory runs out.",
        "fix: The same command goes on from what was saved.",
    ]
    assert time.monotonic() - began < 50, "the rank that waits for ever was not ended"


def test_the_first_ctrl_c_is_handed_on_once_and_the_second_ends_ranks_that_hang(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, hear); touch('up')\nwhile True: time.sleep(1)"
    process = launcher(tmp_path, body)
    all_there(tmp_path, "up")
    process.send_signal(signal.SIGINT)
    all_there(tmp_path, "heard")
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr is not None and process.stderr.read().splitlines() == [
        f"{ASKED}; a second Ctrl-C ends them within 5 s.", "Still running after SIGINT, and killed now: ranks 0-1.",
    ]  # fmt: skip
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGINT SIGINT "] * 2


def test_after_ctrl_c_the_first_rank_may_end_long_after_the_others(tmp_path: Path) -> None:
    body = (
        "sys.path.insert(0, os.getcwd())\n"
        "from gpt4moe.resilience.signals import SignalNotes\n"
        "notes = SignalNotes(); notes.note(); touch('up')\n"
        "while not notes.take(): time.sleep(0.02)\n"
        "time.sleep(1.2)  # a save: what comes now is a second press\n"
        "if rank == 0: time.sleep(1.5); print('the report is written', flush=True)\n"
        "sys.exit(130)"
    )
    process = launcher(tmp_path, body)
    all_there(tmp_path, "up")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (
        130,
        "the report is written\n",
        f"{ASKED}; a second Ctrl-C ends them within 5 s.\n",
    )


def test_after_term_ranks_that_do_not_end_are_named_and_killed(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN if rank else hear); touch('up'); time.sleep(60)"
    process = launcher(tmp_path, body, 3, "--end-seconds=0.5")
    all_there(tmp_path, "up", ranks=3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137
    assert err.splitlines() == [
        "SIGTERM: handed to the ranks, to end in their own way. Those that still run in 0.5 s are killed.",
        "Still running after SIGTERM, and killed now: ranks 0-2.",
    ]


def test_a_signal_that_comes_before_a_rank_is_there_ends_it_too() -> None:
    ranks = Ranks(patience_seconds=600)
    ranks.send(signal.SIGTERM)
    start_ranks(2, ["sleep", "30"], os.environ, ranks)
    ranks.wait()
    assert ranks.status() == (143, 0)


def test_its_own_kill_9_leaves_no_rank(tmp_path: Path) -> None:
    process = launcher(tmp_path, "touch('up'); time.sleep(60)")
    all_there(tmp_path, "up")
    ranks = psutil.Process(process.pid).children()
    process.kill()
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=10)[1]


def test_bad_arguments_end_with_2(tmp_path: Path) -> None:
    status, _, err = ended(tmp_path, "", ranks=0)
    assert status == 2 and err.startswith("error: --nproc-per-node 0 starts no rank.\nfix: ")


FORKED = """
import sys
from gpt4moe.launch_ranks import launch
sys.exit(launch(2, sys.argv[1:], share_imports=True))
"""
"""launch_ranks, of a program that is not the project's own."""


def forked(here: Path, body: str) -> subprocess.Popen[str]:
    program = here / "program.py"
    program.write_text(PROGRAM + body)
    return subprocess.Popen(
        [sys.executable, "-c", FORKED, str(program), "a=b"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "HERE": str(here), "PYTHONPATH": str(here)},
    )  # fmt: skip


def test_ranks_that_share_imports_are_the_launcher_s_own_and_count_as_others_do(tmp_path: Path) -> None:
    body = """
own = [os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')]
facts = [*own, *sys.argv[1:], 'gpt4moe.training.build' in sys.modules, sys.path[0] == str(here), __name__,
         os.getsid(0) == os.getpid(), os.getppid(), os.environ['MASTER_PORT']]
(here / f"facts-{rank}").write_text(' '.join(map(str, facts)))
if rank == 0: time.sleep(60)
os.kill(os.getpid(), 9)
"""
    process = forked(tmp_path, body)
    out, err = process.communicate(timeout=120)
    facts = [(tmp_path / f"facts-{rank}").read_text().split() for rank in (0, 1)]
    assert (process.returncode, out) == (137, "")
    assert err.startswith("error: Rank 1 was killed by SIGKILL, as the system does when memory runs out.\n")
    for rank in (0, 1):
        assert facts[rank] == [
            str(rank), str(rank), "2", "2", "127.0.0.1", "a=b", "True", "True", "__main__", "True", str(process.pid),
            facts[0][-1],
        ]  # fmt: skip


def test_ranks_that_share_imports_hear_signals_and_end_with_the_launcher(tmp_path: Path) -> None:
    process = forked(tmp_path, "signal.signal(signal.SIGUSR1, hear); touch('up')\nwhile True: time.sleep(1)")
    all_there(tmp_path, "up")
    process.send_signal(signal.SIGUSR1)
    all_there(tmp_path, "heard")
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=30)
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=10)[1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_a_signal_amid_the_shared_imports_ends_the_launch_at_once(number: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text(
        PROGRAM.replace('int(os.environ["RANK"])', "0") + "touch('imports'); time.sleep(60)"
    )
    process = forked(tmp_path, "touch('up')")
    all_there(tmp_path, "imports", ranks=1)
    (imports,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and len(err.splitlines()) == 1, err
    assert not psutil.wait_procs([imports], timeout=10)[1] and not list(tmp_path.glob("up-*"))


def test_a_rank_that_somebody_else_has_waited_for_counts_as_ended() -> None:
    process = subprocess.Popen(["true"])
    rank = forked_ranks._Forked(process.pid)
    process.wait()
    assert (rank.poll(), rank.wait()) == (0, 0)
    rank.kill()


def test_imports_are_shared_by_several_ranks_of_this_project_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_ranks, "_DEVICES", ("/no/such/device",))
    assert forked_ranks.may_fork(2, True, "gpt4moe.train") and forked_ranks.may_fork(2, False, "tools/evaluate.py")
    assert not forked_ranks.may_fork(1, True, "gpt4moe.train") and not forked_ranks.may_fork(2, True, "torch.utils")
    assert not forked_ranks.may_fork(2, False, "program.py")
    monkeypatch.setattr(forked_ranks, "_DEVICES", ("/dev/null",))
    assert not forked_ranks.may_fork(2, True, "gpt4moe.train")


def test_a_wrong_override_is_told_without_the_imports(tmp_path: Path) -> None:
    code = "import sys; from gpt4moe import fork_ranks; fork_ranks._import(sys.argv[1:]); print('torch' in sys.modules)"
    words = ["-m", "gpt4moe.train", "+experiment=tiny", "run.name=a", "model.hidden=1"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
