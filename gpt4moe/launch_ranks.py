"""python -m gpt4moe.launch_ranks: starts the ranks of one machine, and ends with the status of the rank that decided.

    python -m gpt4moe.launch_ranks --nproc-per-node 4 -m gpt4moe.train +experiment=tiny parallel=tp2_pp2_ep2 run.name=a
    python -m gpt4moe.launch_ranks --nproc-per-node 4 tools/evaluate.py runs/a --tp 2 --pp 2 --ep 2 --data data/demo

torchrun starts ranks too, on several machines and with restarts. Whatever its ranks ended with, its own status is 1,
behind 35 lines of traceback. Here:

    exit status    of the rank whose failure is the cause; 128 + n: signal n killed it (parallel.rank_processes)
    a rank killed  one line that names it; the others are ended after 5 s, for they wait for it in vain
    signals        INT, HUP, TERM, USR1 and USR2 are handed to every rank. All but USR1 end the launch: ranks that still
                   run --end-seconds later are named and killed. A second Ctrl-C ends them within 5 s
    kill -9        of this process ends its ranks too

Several ranks of gpt4moe or tools/ on CPUs share their imports: one process makes them, and the ranks are its forks
(parallel.forked_ranks). A signal amid the imports ends the launch at once. With --imports=each every rank imports by
itself, as where there is a GPU. This process imports no torch.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf

from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.parallel.forked_ranks import may_fork, start_forked
from gpt4moe.parallel.rank_processes import Ranks, start_ranks
from gpt4moe.resilience.signals import SIGNALS, end_status
from gpt4moe.runlog.command_line import print_error

END_SECONDS = 600.0
"""A step, an evaluation, the save under way and the last one, of a model that one machine holds, on a slow disk. Where
they take longer, --end-seconds must be more: ranks that are killed have not saved."""


def launch(
    num_ranks: int,
    words: Sequence[str],
    *,
    variables: Mapping[str, str] = os.environ,
    end_seconds: float = END_SECONDS,
    share_imports: bool = False,
) -> int:
    """Runs Python on `num_ranks` ranks of this machine. Returns: the exit status. In the main thread only.

    Args:
        words: "-m" and a module, or a file; then its arguments.
    """
    ranks = Ranks(patience_seconds=end_seconds, say=_say)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ranks.send) for number in heard}
    try:
        if not (share_imports and start_forked(num_ranks, words, variables, ranks)):
            if ranks.asked is not None:  # before a rank was there
                return end_status(ranks.asked)
            start_ranks(num_ranks, [sys.executable, *words], variables, ranks)
        ranks.wait()
    finally:
        ranks.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    status, killed = ranks.status()
    if killed is not None:
        name = signal.Signals(status - 128).name
        why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        print_error(f"Rank {killed} was killed by {name}{why}.", "The same command goes on from what was saved.")
    return status


def _say(text: str) -> None:
    """Past Python's buffers: the main thread may hold their lock when a signal comes."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def main(arguments: list[str]) -> int:
    """Exit status: as above; 2 for arguments that it does not know."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt4moe.launch_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc-per-node", "--nproc", type=int, required=True, metavar="N", help="ranks to start")
    parser.add_argument(
        "--end-seconds", type=float, default=END_SECONDS, metavar="S",
        help="after a signal that ends the launch, ranks that still run are killed, saved or not (%(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--imports", choices=("once", "each"), default="once",
        help="once: for all ranks, on CPUs, of this project's programs (the default); each: by every rank",
    )  # fmt: skip
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a file")
    parser.add_argument("program", help="the module or file that each rank runs")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = parser.parse_args(arguments)
    try:
        if given.nproc_per_node < 1:
            raise LaunchError(f"--nproc-per-node {given.nproc_per_node} starts no rank.", "Set 1 or more.")
        if not 0 < given.end_seconds < inf:
            raise LaunchError(f"--end-seconds {given.end_seconds:g} is no time.", "Set seconds above 0.")
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    share_imports = given.imports == "once" and may_fork(given.nproc_per_node, given.module, given.program)
    module = ["-m"] if given.module else []
    return launch(
        given.nproc_per_node, [*module, given.program, *given.rest], end_seconds=given.end_seconds,
        share_imports=share_imports,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
