"""python -m gpt4moe.fork_ranks RANKS PIPE -m MODULE ... | FILE ...: imports once, then forks the ranks and ends.

launch_ranks starts it (parallel/forked_ranks.py). Each rank runs the module or file as `python -m MODULE` would, in a
session of its own, and dies with the launcher. PIPE is an open file that gets each rank's process number in a line.
"""

import ctypes
import gc
import os
import runpy
import signal
import sys
import time
import warnings
from contextlib import suppress

from gpt4moe.config.load import load_run_config
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.parallel.rank_processes import PR_SET_PDEATHSIG, rank_variables

_LOOK_SECONDS = 0.002


def main(arguments: list[str]) -> None:
    """In a rank returns when its program has; raises what that raises. In their parent does not return."""
    num_ranks, pipe, words = int(arguments[0]), int(arguments[1]), arguments[2:]
    launcher, parent = os.getppid(), os.getpid()
    _import(words)
    for own in rank_variables(num_ranks):
        number = os.fork()
        if number == 0:
            os.close(pipe)
            os.environ.update(own)
            _leave(parent, launcher)
            _run(words)
            return
        os.write(pipe, f"{number}\n".encode())
    os._exit(0)  # what the imports have left to be done at the end, the ranks do


def _import(words: list[str]) -> None:
    """What a rank that trains or generates needs. What cannot be imported, and a configuration that is wrong, the ranks
    will report: they find the latter without torch, so nothing else is imported then."""
    overrides = words[2:] if words[:2] == ["-m", "gpt4moe.train"] else ["+experiment=tiny", "run.name=imports"]
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)\b")  # as the ranks do
    with suppress(ImportError, Gpt4MoeError):
        # Hydra's parser and its tables of types are made at the first load.
        load_run_config(overrides)
        import gpt4moe.train  # sets what torch reads when it is loaded
        import gpt4moe.training.build  # noqa: F401

        del sys.modules["gpt4moe.train"]  # the ranks run it as a program: runpy remarks on one that is there
    # A collection in a rank then passes over what was imported here.
    gc.collect()
    gc.freeze()


def _leave(parent: int, launcher: int) -> None:
    """Waits until the launcher is this rank's parent, and dies with it from then on."""
    os.setsid()  # a terminal's Ctrl-C comes to the launcher alone
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(128 + signal.SIGKILL)


def _run(words: list[str]) -> None:
    is_module = words[0] == "-m"
    program, sys.argv = words[int(is_module)], words[int(is_module) :]
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
