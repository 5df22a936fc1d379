"""Makes a data folder to train on from text: jsonl (.gz, .zst), parquet, plain text, source trees.

examples:
  python tools/tokenize_corpus.py --tokenizer data/demo/tokenizer.json --out data/mine --source books=a.jsonl,b.jsonl
  python tools/tokenize_corpus.py --train-tokenizer 32768 --out data/two --processes 8 --deduplicate \\
      --source 'web=crawl/*.jsonl.gz' --licence web=CC-BY-4.0 --source code=checkouts/ --fim code=0.5 \\
      --decontaminate benchmarks.jsonl
  python tools/tokenize_corpus.py --out data/mine --extend books=c.jsonl
then train with data=demo data.path=data/mine model.vocab_size=<the tokenizer's>. docs/corpus.md has the rest.

A line of a jsonl is one document: {"text": "..."}; so is a row of parquet, a text file, a file of a source tree.
Killed, the same command goes on where it was. exit status: 0 made, 2 bad input, 130 stopped by Ctrl-C.
"""

import sys
from pathlib import Path

from rich.console import Console

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 made, 2 bad input, 130 stopped by Ctrl-C."""
    from gpt4moe.corpus.command import make_parser, run, summary
    from gpt4moe.data.progress import byte_bar
    from gpt4moe.errors import INTERRUPTED, Gpt4MoeError
    from gpt4moe.runlog.command_line import print_error

    given = make_parser(__doc__).parse_args(arguments)
    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        made = run(given, byte_bar, lambda line: messages.print(line, markup=False))
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("Stopped by Ctrl-C.", "The same command goes on where it was.")
        return INTERRUPTED
    for name, manifest in made.items():
        sys.stdout.write("".join(f"{line}\n" for line in summary(name, manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
