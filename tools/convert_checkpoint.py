"""Checkpoints to and from Hugging Face format, and cut for inference. A checkpoint is a step folder, or a run folder
(its latest).

examples:
  python tools/convert_checkpoint.py to-hf runs/first exported --max-shard-size 2GB --dry-run
  python tools/convert_checkpoint.py from-hf mixtral imported
  python tools/convert_checkpoint.py from-hf llama upcycled --upcycle-experts 16
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
from gpt4moe.telemetry.console import error as print_error


def logits(folder: Path, prompts: list[list[int]]) -> list[Any]:
    """Of each prompt [S, V], fp32: by transformers for its own format, by our model for ours."""
    import torch

    warnings.filterwarnings("ignore")
    batches = [torch.tensor([prompt]) for prompt in prompts]
    with torch.no_grad():
        if (folder / "config.json").exists():
            from transformers import AutoModelForCausalLM

            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return [theirs(batch).logits[0].numpy() for batch in batches]
        from gpt4moe.inference.load import loaded_model

        with loaded_model(folder) as ours:
            positions = [torch.arange(batch.shape[1]).unsqueeze(0) for batch in batches]
            return [ours.chunk(*pair, None)[0].float().cpu().numpy() for pair in zip(batches, positions, strict=True)]


def main(arguments: list[str] | None = None) -> int:
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
