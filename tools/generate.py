"""Generates text from a checkpoint or a Hugging Face folder.

    python tools/generate.py runs/first --prompt "def main(" --prompt "The " --tokens 60
    python tools/generate.py runs/first/checkpoints/step-00000100 --temperature 0 --json
    python tools/generate.py exported                    # a Hugging Face folder, run by transformers

One process, plain sampling. --json prints [{"prompt": ..., "text": ...}] alone on stdout.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.runlog.command_line import print_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a step folder, a run folder (its latest), or a Hugging Face folder")
    parser.add_argument("--prompt", action="append", help='text to continue (may be repeated; default "The ")')
    parser.add_argument("--tokens", type=int, default=60, help="tokens per sample at most (default 60)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most probable token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability sampled from (default 0.95)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        from gpt4moe.inference.generation import write_samples

        samples = write_samples(options.folder, options.prompt or ["The "], num_tokens=options.tokens,
                                temperature=options.temperature, top_p=options.top_p, seed=options.seed)  # fmt: skip
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    if options.json:
        sys.stdout.write(json.dumps(samples) + "\n")
    else:
        for sample in samples:
            sys.stdout.write(f"--- {sample['prompt']!r}\n{sample['prompt']}{sample['text']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
