"""What a run reads: its sources, the origin of any sample, whether the files are whole; and files of Megatron-LM.

  python tools/mixture.py show +experiment=tiny                    tokens, share, samples, epochs, disk of each source
  python tools/mixture.py show +experiment=gpt4                    the 13T tokens as reported: a plan, without files
  python tools/mixture.py sample 4711 +experiment=tiny             sample 4711 of a run: source, epoch, file, document
  python tools/mixture.py step 20 +experiment=tiny                 which samples step 20 of a run reads
  python tools/mixture.py verify data/demo                         reads every byte of a data folder; exit 1: damaged
  python tools/mixture.py register data/web --tokenizer t.json --source web=old/a,old/b --valid web=old/valid

show, sample and step take Hydra overrides of a run (tools/plan.py --help), verify takes folders. With --json stdout is
JSON alone.
register reads pairs of .bin/.idx that Megatron-LM's preprocess_data.py wrote, and writes hashes and a manifest; the
files stay where they are. A path is given without .bin or .idx. To remove a source, delete its folder.

exit status: 0 good; 1 verify found damage; 2 bad input.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.runlog.command_line import run_tool


def main(arguments: list[str] | None = None) -> int:
    return run_tool(sys.argv[1:] if arguments is None else arguments, __doc__, _act)


def _act(arguments: list[str]) -> int:
    from gpt4moe.data.command import answer

    command, *words = arguments
    found = answer(command, [word for word in words if word != "--json"])
    if "--json" in words:
        sys.stdout.write(json.dumps(found.facts) + "\n")
    elif found.lines:
        sys.stdout.write("".join(f"{line}\n" for line in found.lines))
    else:
        from rich.console import Console

        from gpt4moe.pages.mixture_table import mixture_table

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        for part in mixture_table(found.facts):
            console.print(part, markup=False)
    return found.status


if __name__ == "__main__":
    sys.exit(main())
