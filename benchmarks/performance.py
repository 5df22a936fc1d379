"""Runs the benchmarks beside peers and writes docs/performance.md: what each printed, with command, date and commit.

    python -m benchmarks.performance                      all of them, about half an hour
    python -m benchmarks.performance loader generation    these alone; the sections of others stay as they are

Let nothing else run meanwhile: each output names the machine and its load. A section is written when its benchmark has
ended, whatever it says of its targets.
"""

import argparse
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from gpt4moe.runlog.run_files import replace_file

BENCHMARKS = {
    "startup": "Four ranks, from their launch to the first step",
    "moe_layer": "One MoE layer over its plain matrix products, beside Hugging Face, DeepSpeed and Megatron",
    "training_step": "A whole step of one process, beside Hugging Face and Megatron",
    "training_ranks": "A whole step of two ranks, beside Megatron and Hugging Face",
    "engines": "A step under engine=deepspeed over the same step under engine=megatron",
    "routing": "What uneven routing costs, beside the plan",
    "generation": "Greedy text and loading, beside transformers and cp",
    "checkpoints": "Saving, loading and converting, beside cp, torch and transformers",
    "loader": "Samples to micro-batches, beside Megatron-core's GPTDataset",
    "telemetry": "The report of a long run, the list of many",
}
_LOGGED = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[")
"""DeepSpeed's log, which goes to the same place: of each rank, that there is no GPU."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
HEAD = """# Speed on CPUs, beside peers

You want to know how fast this is next to what else you could use. Each section is what its command printed, with rows
where a peer wins and targets that were missed; [benchmarks/README.md](../benchmarks/README.md) says what each measures.
`make bench` writes this page. Nothing here was measured on a GPU.
"""


def main(arguments: list[str], page: Path = PAGE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args(arguments).names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]}; choose of {', '.join(BENCHMARKS)}")
    failed, commit = [], _commit()
    for name in names:
        sys.stderr.write(f"{name} ...\n")
        began = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True, check=False
        )
        if ended.returncode:
            failed.append(name)
            continue
        text = page.read_text() if page.exists() else ""
        replace_file(
            page, with_section(text, name, section(name, ended.stdout, commit, time.monotonic() - began)).encode()
        )
    if failed:
        sys.stderr.write(f"No new section for {', '.join(failed)}: the benchmark failed, its error is above.\n")
    return 1 if failed else 0


def section(name: str, printed: str, commit: str, seconds: float) -> str:
    """The section of one benchmark, in Markdown."""
    said = f"`python -m benchmarks.{name}`, {datetime.now(UTC).date()}, {commit}, {seconds:.0f} s."
    own = "\n".join(line for line in printed.splitlines() if not _LOGGED.match(line)).strip()
    return f"## {BENCHMARKS[name]}\n\n{said}\n\n```\n{own}\n```\n"


def with_section(page: str, name: str, new: str) -> str:
    """The page with this section in its place, others as they were, in the order of BENCHMARKS."""
    title = re.compile(f"^## ({'|'.join(map(re.escape, BENCHMARKS.values()))})$", re.MULTILINE)
    starts = list(title.finditer(page))
    ends = [*(start.start() for start in starts), len(page)][1:]
    found = {it[1]: page[it.start() : end].rstrip() + "\n" for it, end in zip(starts, ends, strict=True)}
    found[BENCHMARKS[name]] = new
    return "\n".join([HEAD, *(found[title] for title in BENCHMARKS.values() if title in found)])


def _commit() -> str:
    """Of the code that is measured; "-dirty" where files were changed since."""
    command = ["git", "-C", str(PAGE.parent), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"commit {answer.stdout.strip()}" if answer.returncode == 0 else "no commit"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
