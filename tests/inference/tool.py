"""tools/generate.py, or another tool, in ranks of tests/spawn.py, as a launcher starts it."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks
from tests.training.command import Ended, set_variables

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate.py"


def generate(*arguments: object, ranks: int = 1, tool: Path = TOOL) -> list[Ended]:
    """How each rank ended."""
    return run_ranks(ranks, _run, tool, list(map(str, arguments)))


def torchrun(tool: Path, *arguments: object, ranks: int = 4) -> list[str]:
    """The command line of real processes, which people start."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, str(tool), *map(str, arguments)]


def _run(environment: Environment, tool: Path, arguments: list[str]) -> Ended:
    from gpt4moe.parallel import environment as resolver

    resolver.FIRST_STAYS_SECONDS = resolver.OTHERS_STAY_SECONDS = 0.0  # nobody ends a rank because another has left
    set_variables(environment, {})
    specification = importlib.util.spec_from_file_location("tool", tool)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(err.fileno(), sys.stderr.fileno())
        status = module.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return Ended(status, out.read(), err.read())
