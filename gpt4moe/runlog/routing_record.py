"""routing/rank_00003.jsonl: how many rows a rank sent to each expert, in the steps that training.record_routing names.

    {"step": 40, "layer": 1, "rank": 3, "sources": 4, "top_k": 2, "tokens": [35, 0, 12, 81]}

A line for each step and MoE layer that the rank has. `tokens` counts assignments before drops, without padding, over
the rank's micro-batches of the step; `sources` is how many ranks have this layer, each with a file and other tokens.
Nothing is sent for it: a rank writes what it has counted anyway. Summed over sources it is the load of the metrics.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.errors import DataError
from gpt4moe.runlog.step_lines import StepLine, StepLines, read_step_lines

ROUTING_FOLDER = "routing"
_FILE = re.compile(r"rank_(\d{5,})\.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRouting:
    """One layer in one step."""

    step: int
    layer: int
    top_k: int
    tokens: list[list[int]]
    """[sources, experts], in the order of ranks."""


class RoutingLog:
    """The open file of one rank and launch."""

    def __init__(self, run_folder: Path, rank: int, resume_step: int):
        """Drops lines of later steps, which will be made again. Makes no file. Raises: OSError."""
        self.lines = StepLines.open(run_folder / ROUTING_FOLDER / f"rank_{rank:05}.jsonl", resume_step)

    def add(self, lines: list[StepLine]) -> None:
        """Appends the lines of a step. Raises: OSError."""
        self.lines.path.parent.mkdir(exist_ok=True)
        self.lines.add(lines)


def drop_other_ranks(run_folder: Path, ranks: int, resume_step: int) -> None:
    """Later steps' lines of ranks that this launch, of so many ranks, has not. Raises: OSError."""
    for rank, path in _files(run_folder / ROUTING_FOLDER):
        if rank >= ranks:
            StepLines.open(path, resume_step)


def read_routing(run_folder: Path) -> list[RecordedRouting]:
    """Every recorded step and layer, in their order.

    Raises: DataError when there is none, or when a line is damaged or missing.
    """
    folder = run_folder / ROUTING_FOLDER
    found: dict[tuple[int, int], list[StepLine]] = {}
    for rank, path in _files(folder):
        for line in read_step_lines(path):
            if not _is_whole(line, rank):
                raise DataError(f"{path}: a line is none of a routing record: {str(line)[:100]}.", _CURE)
            found.setdefault((line["step"], line["layer"]), []).append(line)
    if not found:
        raise DataError(
            f"{folder} has no recorded step.", "Set training.record_routing=1 in a run, or give its folder."
        )
    return [_joined(folder, key, lines) for key, lines in sorted(found.items())]


_CURE = "Record again: set training.record_routing in a new run."


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Rank and file, in the order of ranks."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ranks = sorted(int(match[1]) for match in map(_FILE.fullmatch, names) if match)
    return ((rank, folder / f"rank_{rank:05}.jsonl") for rank in ranks)


def _is_whole(line: StepLine, rank: int) -> bool:
    numbers = [line.get(name) for name in ("layer", "rank", "sources", "top_k")]
    tokens = line.get("tokens")
    if not isinstance(tokens, list) or not tokens or line.get("rank") != rank:
        return False
    return all(type(value) is int and value >= 0 for value in [*numbers, *tokens]) and line["top_k"] > 0


def _joined(folder: Path, key: tuple[int, int], lines: list[StepLine]) -> RecordedRouting:
    step, layer = key
    alike = {(line["sources"], line["top_k"], len(line["tokens"])) for line in lines}
    sources, top_k, _ = next(iter(alike))
    if len(alike) > 1 or len(lines) != sources or len({line["rank"] for line in lines}) < sources:
        raise DataError(
            f"{folder}: step {step}, layer {layer} has {len(lines)} lines of {sources} ranks, or of several runs.",
            _CURE,
        )
    return RecordedRouting(step=step, layer=layer, top_k=top_k, tokens=[line["tokens"] for line in lines])
