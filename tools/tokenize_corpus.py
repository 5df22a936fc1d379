"""Makes a data folder to train on from text files. Each line of a file is one document: {"text": "..."}.

examples:
  python tools/tokenize_corpus.py --tokenizer data/demo/tokenizer.json --out data/mine --source books=a.jsonl,b.jsonl
  python tools/tokenize_corpus.py --tokenizer t.json --out data/two --source web=web.jsonl --source code=code.jsonl \\
      --licence web=CC-BY-4.0 --held-out 0.001
then train with data=demo data.path=data/mine model.vocab_size=<the tokenizer's>.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 made, 2 bad input."""
    from gpt4moe.errors import Gpt4MoeError
    from gpt4moe.runlog.command_line import print_error

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json with <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True, help="the data folder to make")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=FILE[,FILE...]", type=_named)
    parser.add_argument("--licence", action="append", default=[], metavar="NAME=LICENCE", type=_named)
    parser.add_argument("--held-out", type=float, default=0.01, help="share of documents for validation (0.01)")
    options = parser.parse_args(arguments)
    # Imported after --help and bad arguments are done with: Megatron takes seconds to load.
    from gpt4moe.data.preprocess import jsonl_source, write_data_folder

    licences = dict(options.licence)
    texts = {}
    for name, files in options.source:
        paths = [Path(file) for file in files.split(",")]
        texts[name] = jsonl_source(paths, held_out_share=options.held_out, licence=licences.get(name, "unknown"))
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} characters"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("tokenize", total=None)
            write_data_folder(options.out, texts, options.tokenizer, lambda amount: progress.advance(task, amount))
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    return 0


def _named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
