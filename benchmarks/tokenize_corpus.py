"""tools/tokenize_corpus.py from jsonl to checked shards, beside gigatoken alone on the same file.

    python -m benchmarks.tokenize_corpus

The text is what this machine has, each file once: gigatoken remembers words, and repeated text would only measure that.
The library reads the same jsonl by its own reader (encode_files); the tool reads, parses, holds out, tokenizes, writes,
hashes input and output, and checks. Both are measured in processor seconds of a process on one core, so that others'
work on the machine counts little, and in turns: a ratio is the median over rounds. The tool's seconds include its
start, which a corpus of many GB does not notice: the ratio without the start (of both) is printed too. Target: at
least 0.8 of the library's rate.
"""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine

TARGET = 0.8
BYTES, LARGEST = 400_000_000, 300_000
FEW, ROUNDS = 4_000_000, 3
VOCABULARY = 16_384
SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".c", ".txt", ".md", ".rst", ".js", ".html", ".pm", ".pod", ".json"}
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> None:
    read_options(__doc__, arguments)
    print(f"Tokenizing a jsonl of this machine's text. {machine()}")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        text, few = folder / "text.jsonl", folder / "few.jsonl"
        size = _write_text(text)
        tokenizer = _train(folder)
        few.write_bytes(text.read_bytes()[:FEW].rpartition(b"\n")[0] + b"\n")
        print(f"{size / 1e6:.0f} MB of text, each file once; byte-level vocabulary of {VOCABULARY}; {ROUNDS} rounds\n")
        rounds = [_round(folder, text, few, tokenizer) for _ in range(ROUNDS)]
        for what, key in (
            ("gigatoken, its own reader of the file", "file"), ("gigatoken, batches of 2 MB in memory", "batches"),
            ("tokenize_corpus.py, 1 process", "tool"), ("tokenize_corpus.py, 2 processes", "two"),
        ):  # fmt: skip
            _line(what, size / median(one[key] for one in rounds))
        _line("tokenizers, one thread, 5 MB of it", 5e6 / median(one["plain"] for one in rounds))
        share = median(one["file"] / one["tool"] for one in rounds)
        late = median((one["file"] - one["few file"]) / (one["tool"] - one["few tool"]) for one in rounds)
        batches = median(one["batches"] / one["tool"] for one in rounds)
        wall = [median(one[key] for one in rounds) for key in ("wall", "two wall")]
        print(f"\n  one process: {share:.2f} of its own reader, {late:.2f} without the start of both "
              f"({median(one['few tool'] for one in rounds):.1f} s); {batches:.2f} of its batches")  # fmt: skip
        print(f"  by the clock {wall[0]:.1f} s, with two processes {wall[1]:.1f} s")
        for what, value in (("the library's rate", share), ("that rate without the start of both", late)):
            print(f"  target: at least {TARGET} of {what}: {'' if value >= TARGET else 'NOT '}reached")
        found = [(folder / f"out{number}" / "text" / "train-00000.bin").read_bytes() for number in (1, 2)]
        print(f"  the two outputs are {'equal' if found[0] == found[1] else 'NOT equal'}")


def _round(folder: Path, text: Path, few: Path, tokenizer: Path) -> dict[str, float]:
    """Processor seconds of each contender, and seconds by the clock of the tool."""
    file, batches, plain = (float(line) for line in _library(text, tokenizer))
    tool, wall = _tool(folder, text, tokenizer, 1)
    two, two_wall = _tool(folder, text, tokenizer, 2)
    few_tool, _ = _tool(folder, few, tokenizer, 3)
    return {
        "file": file, "batches": batches, "plain": plain, "tool": tool, "wall": wall, "two": two, "two wall": two_wall,
        "few file": float(_library(few, tokenizer)[0]), "few tool": few_tool,
    }  # fmt: skip


def _line(what: str, bytes_per_second: float) -> None:
    print(f"  {what:<42} {bytes_per_second / 1e6:>7.1f} MB per processor second")


def _texts() -> Iterator[str]:
    seen = set()
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share", "/usr/include"):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
                continue
            if not 0 < path.stat().st_size <= LARGEST:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield text


def _write_text(path: Path) -> int:
    """Returns: bytes of the documents."""
    size = 0
    with path.open("w") as stream:
        for text in _texts():
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size > BYTES:
                break
    return size


def _train(folder: Path) -> Path:
    from gpt4moe.corpus.inputs import find_inputs
    from gpt4moe.corpus.sample import texts_to_train_on
    from gpt4moe.data.tokenizer import train_tokenizer

    inputs = {"text": find_inputs("text", [str(folder / "text.jsonl")])}
    train_tokenizer(texts_to_train_on(inputs, "text", 10_000_000), vocab_size=VOCABULARY).backend.save(
        str(folder / "t.json")
    )
    return folder / "t.json"


LIBRARY = """
import json, sys, time
import gigatoken, tokenizers
text, tokenizer = sys.argv[1:]
fresh = gigatoken.Tokenizer(tokenizer)
begin = time.process_time()
fresh.encode_files(gigatoken.JsonlFileSource([text]), parallel=False)
print(time.process_time() - begin)
fresh, spent, batch, size, few = gigatoken.Tokenizer(tokenizer), 0.0, [], 0, []
for line in open(text):
    batch.append(json.loads(line)["text"].encode())
    size += len(batch[-1])
    if size > 1 << 21:
        begin = time.process_time()
        fresh.encode_batch(batch, parallel=False)
        spent += time.process_time() - begin
        few = few if sum(map(len, few)) > 5e6 else few + batch
        batch, size = [], 0
print(spent)
plain, few = tokenizers.Tokenizer.from_file(tokenizer), [text.decode() for text in few]
total = sum(len(text.encode()) for text in few)
begin = time.process_time()
plain.encode_batch_fast(few)
print((time.process_time() - begin) * 5e6 / total)
"""


def _library(text: Path, tokenizer: Path) -> list[str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", LIBRARY, str(text), str(tokenizer)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def _tool(folder: Path, text: Path, tokenizer: Path, number: int) -> tuple[float, float]:
    """Processor seconds with those of its processes, and seconds by the clock.

    Args:
        number: 1 or 2 processes, 3: one process for the few.
    """
    out = folder / f"out{number}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, str(ROOT / "tools" / "tokenize_corpus.py"), f"--tokenizer={tokenizer}", f"--out={out}",
        f"--source=text={text}", f"--processes={2 if number == 2 else 1}",
    ]  # fmt: skip
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    main(sys.argv[1:])
