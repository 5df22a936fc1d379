"""Converts checkpoints to and from Hugging Face format, or cuts them into one file a rank for inference. A checkpoint
is a step folder, or a run folder (its latest checkpoint).

examples:
  python tools/convert_checkpoint.py to-hf runs/first exported --max-shard-size 2GB --dry-run
  python tools/convert_checkpoint.py to-hf runs/seen exported --encoder siglip      # with exported/vision
  python tools/convert_checkpoint.py to-idefics runs/seen idefics --without-clips
  python tools/convert_checkpoint.py from-hf mixtral imported
  python tools/convert_checkpoint.py from-hf llama upcycled --upcycle-experts 16
  python tools/convert_checkpoint.py merge runs/adapted merged
  python tools/convert_checkpoint.py to-peft runs/adapted adapter --model exported
  python tools/convert_checkpoint.py to-inference runs/first served --tp 8 --pp 16
  python tools/convert_checkpoint.py verify runs/first exported --prompts prompts.txt

exit status: 0 done, or equal; 1 different; 2 bad input.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.convert import command_line
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.runlog.command_line import print_error


def logits(folder: Path, prompts: list[list[int]], is_rounded: bool) -> list[Any]:
    """Logits of each prompt, [S, V], fp32. Imports torch here, because only verify --prompts needs it."""
    from gpt4moe.inference.logits import folder_logits

    return folder_logits(folder, prompts, is_rounded=is_rounded)


def main(arguments: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore")
    given = command_line.parser(__doc__ or "").parse_args(arguments)
    try:
        answer = command_line.answered(given, logits)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    text = json.dumps(answer, indent=1) if given.json else "\n".join(command_line.lines(given, answer))
    sys.stdout.write(text + "\n")
    return command_line.status(answer)


if __name__ == "__main__":
    sys.exit(main())
