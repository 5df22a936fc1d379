"""Reads a checkpoint without torch: which expert of each layer has moved furthest from the average expert?

  python examples/read_checkpoint.py runs/first

A checkpoint is a set of logical tensors, whatever layout wrote it. `CheckpointIndex` finds the pieces of any box of any
tensor and checks the hash of each block that it reads. Here one expert is read at a time, so memory stays small.
"""

import argparse
import sys
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package lies beside examples/

import numpy as np

from gpt4moe.checkpoint.index import CheckpointIndex
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.errors import Gpt4MoeError

EXPERTS = ".mlp.experts.down"
"""End of the name of a [experts, hidden, ffn] tensor."""


def expert(checkpoint: CheckpointIndex, name: str, index: int) -> np.ndarray:
    """One expert's down projection, [hidden, ffn] fp32."""
    _, *shape = checkpoint.shape(name)
    out = np.empty((1, *shape), dtype=np.float32)
    for where, values in checkpoint.read_box(name, (index, *(0 for _ in shape)), out.shape):
        out[where] = values
    return out[0]


def distances(checkpoint: CheckpointIndex, name: str) -> list[float]:
    """Of each expert, the root mean square of its difference to the mean of all experts."""
    count, *shape = checkpoint.shape(name)
    mean = np.zeros(shape, dtype=np.float64)
    for index in range(count):
        mean += expert(checkpoint, name, index) / count
    scale = prod(shape) ** 0.5
    return [float(np.linalg.norm(expert(checkpoint, name, index) - mean) / scale) for index in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder, or a step folder")
    given = parser.parse_args()
    try:
        checkpoint = CheckpointIndex(find_checkpoint(given.checkpoint))
        sys.stdout.write(f"{checkpoint.folder}, step {checkpoint.manifest.step}\n")
        for name in sorted(checkpoint.shapes):
            if name.startswith("weight/") and name.endswith(EXPERTS):
                away = distances(checkpoint, name)
                furthest = int(np.argmax(away))
                sys.stdout.write(
                    f"{name.removeprefix('weight/')}: expert {furthest}, {away[furthest]:.2e} a weight; "
                    f"median {np.median(away):.2e}\n"
                )
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error.cause}\n{error.cure}\n")
        return error.exit_code
    assert "torch" not in sys.modules
    return 0


if __name__ == "__main__":
    sys.exit(main())
