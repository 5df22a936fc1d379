"""Makes conversations to fine-tune on (stage=sft) from chat lines: tokens, and which of them are the assistant's.

  python tools/prepare_chat.py --tokenizer data/demo/tokenizer.json --out data/chat --source help=chat.jsonl
  python tools/prepare_chat.py --tokenizer models/mixtral --out data/chat --source a=a.jsonl --valid a=held.jsonl

--tokenizer    a folder of Hugging Face with a chat template, or a tokenizer.json, which gets a default template
--template     a jinja file in place of that template
--source       NAME=FILE[,FILE]: {"messages": [...]}, ShareGPT's {"conversations": [...]}, Alpaca's {"instruction": ...}
--valid        NAME=FILE[,FILE]: held-out lines; without, --held-out 0.01 of the source's are
--bad-rows     refuse (default) or skip: bad lines are listed in OUT/NAME/skipped.jsonl
--licence      NAME=LICENCE
--vocab-size   the model's, where it is larger than the tokenizer's
--json         stdout is JSON alone

then train with stage=sft data=demo data.path=data/chat model.vocab_size=<the same>. Exit status: 0 made, 2 bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.runlog.command_line import run_tool


def main(arguments: list[str] | None = None) -> int:
    return run_tool(sys.argv[1:] if arguments is None else arguments, __doc__, _act)


def _act(arguments: list[str]) -> int:
    from gpt4moe.chat.command import prepare, summary
    from gpt4moe.data.source_command import make_sources

    return make_sources(arguments, "conversations", prepare, summary)


if __name__ == "__main__":
    sys.exit(main())
