"""Lists, shows, verifies and compares checkpoints, without a model or a GPU. A checkpoint is a step folder, or a run
folder (its latest checkpoint).

examples:
  python tools/inspect_checkpoint.py ls runs/first
  python tools/inspect_checkpoint.py show runs/first --tensors
  python tools/inspect_checkpoint.py verify runs/first/checkpoints/step-00000100
  python tools/inspect_checkpoint.py diff runs/first runs/second --tolerance 1e-6 --json

exit status: 0 good; 1 different, or damaged; 2 bad input.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.checkpoint import inspection, inspection_text
from gpt4moe.errors import Gpt4MoeError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|show|verify|diff")
    help_of = {
        "ls": "the checkpoints of a run folder", "show": "step, run, tensors of a checkpoint, from its manifest",
        "verify": "check every byte and every slice", "diff": "which tensors differ, by how much",
    }  # fmt: skip
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in help_of.items()}
    for name, command in parsers.items():
        for place in ("a", "b") if name == "diff" else ("path",):
            command.add_argument(place, type=Path, metavar={"ls": "RUN"}.get(name, "CHECKPOINT"))
        command.add_argument("--json", action="store_true", help="print everything as JSON")
    parsers["show"].add_argument("--tensors", action="store_true", help="print names, shapes and slices too")
    parsers["diff"].add_argument(
        "--tolerance", type=inspection_text.tolerance, default=0.0, help="largest |a - b| that passes (0)"
    )
    given = parser.parse_args(arguments)
    try:
        answer, lines = {
            "ls": lambda: (inspection.listing(given.path), inspection_text.listing_lines),
            "show": lambda: (
                inspection.description(given.path, tensors=given.tensors), inspection_text.description_lines
            ),
            "verify": lambda: (inspection.verification(given.path), inspection_text.verification_lines),
            "diff": lambda: (
                inspection.difference(given.a, given.b, tolerance=given.tolerance), inspection_text.difference_lines
            ),
        }[given.command]()  # fmt: skip
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(answer, indent=1) + "\n" if given.json else "".join(f"{x}\n" for x in lines(answer)))
    return int(any(answer.get(key) for key in ("problems", "different", "other_shape", "only_in_a", "only_in_b")))


if __name__ == "__main__":
    sys.exit(main())
