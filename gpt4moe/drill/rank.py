"""One rank of a drill: the train command with its faults planted.

python -m gpt4moe.drill.rank FOLDER OVERRIDES...     a cold rank; FOLDER has the launch's faults in faults.json
forked(...)                                          the same in a fork of a server that has made the imports
"""

import json
import os
import sys
from pathlib import Path

from gpt4moe.drill.kinds import START, Fault

FAULTS = "faults.json"


def main(arguments: list[str]) -> int:
    """Exit status: train's."""
    from gpt4moe.drill.planted import Planted, plant
    from gpt4moe.train import main as train
    from gpt4moe.train import signals

    folder = Path(arguments[0])
    signals.listen()
    faults = [Fault(**fault) for fault in json.loads((folder / FAULTS).read_text())]
    planted = Planted(faults, int(os.environ["RANK"]), folder)
    plant(planted)
    planted.at(START)
    return train(arguments[1:])


def forked(variables: dict[str, str], arguments: list[str], log: str) -> None:
    """A forked rank, from its first moment to its exit. Args: log: what it prints is added to this file."""
    os.setsid()  # as launch_ranks does: a terminal's Ctrl-C comes to the drill alone
    os.environ.update(variables)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    import torch

    torch.set_num_threads(1)
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
