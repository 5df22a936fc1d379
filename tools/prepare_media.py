"""Makes documents with images to train on (stage=vision): tokens, and the images that stand in the text.

  python tools/prepare_media.py --tokenizer data/demo/tokenizer.json --add-image-token replace --out data/seen \\
      --source web=web.jsonl --source pairs=shards/00000.tar,shards/00001.tar --source clips=clips/

--tokenizer        a tokenizer.json, or a folder that has one
--image-token      special token that stands for an image (<image>); a tokenizer without it is refused, unless
--add-image-token  replace: it takes the number of the last merge, the vocabulary keeps its size; grow: a number more
--source           NAME=PATH[,PATH]: a .jsonl (interleaved, OBELICS, MMC4, pairs), a folder of pairs, a WebDataset .tar
--images           folder that the images of .jsonl lines lie in; default: beside each file
--valid            NAME=PATH[,PATH]: held-out documents; without, --held-out 0.01 of the source's are
--bad-rows         refuse (default) or skip: bad documents are listed in OUT/NAME/skipped.jsonl
--max-bad          share of bad images that are left out and listed in OUT/NAME/bad_images.jsonl (0.01); more: exit 2
--max-pixels, --max-bytes      an image with more is a bad one (50,000,000)
--licence NAME=LICENCE, --vocab-size (the model's, where larger), --workers 2 (threads that decode), --json

Exit status: 0 made, 2 bad input. docs/vision-data.md has the rest.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.runlog.command_line import run_tool


def main(arguments: list[str] | None = None) -> int:
    return run_tool(sys.argv[1:] if arguments is None else arguments, __doc__, _act)


def _act(arguments: list[str]) -> int:
    from gpt4moe.data.source_command import make_sources
    from gpt4moe.media.command import prepare, summary

    return make_sources(arguments, "documents", prepare, summary)


if __name__ == "__main__":
    sys.exit(main())
