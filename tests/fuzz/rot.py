"""python -m tests.fuzz.rot: every file of every format flipped, cut, deleted and swapped; who finds it, and names it.

  python -m tests.fuzz.rot --places 5 --write      with its table written into docs/hostile-files.md

A find is an exit status other than 0, in words that name the file (or, of a header's tensor, its folder), from the
command that verifies the format. Exit status: 0 all found; 1 something was not.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.__main__ import try_case
from tests.fuzz.cases import RESUME, Case
from tests.fuzz.damage import PARTS, Damage
from tests.fuzz.worlds import make_world

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "hostile-files.md"
BEGIN, END = "<!-- rot: written by python -m tests.fuzz.rot --write -->", "<!-- end of rot -->"
HOWS = ("flip", "cut", "delete", "swap")


@dataclass(frozen=True)
class Format:
    """Files of one format, and the command that is to find what befell them."""

    name: str
    files: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Files that are left alone: nothing relies on them."""


FORMATS = (
    Format("checkpoint", "ckpt/*", ("inspect_checkpoint", "verify", "ckpt"), ("ckpt",)),
    Format("adapters", "adapters/*", ("inspect_checkpoint", "verify", "adapters"), ("adapters", "ckpt")),
    Format("dataset", "data/*/*", ("mixture", "verify", "data"), ("data",)),
    Format("dataset's tokenizer", "data/tokenizer.json", ("mixture", "verify", "data"), ("data",)),
    Format("run folder's configuration", "runs/first/resolved.yaml", RESUME, ("runs", "data")),
    Format("run folder's identity", "runs/first/identity.json", RESUME, ("runs", "data")),
    Format("run folder's launches", "runs/first/starts/*", RESUME, ("runs", "data")),
    Format("run folder's goings back", "runs/first/gone_back.json", RESUME, ("runs", "data")),
    Format("inference export", "inference/*", ("convert_checkpoint", "verify", "inference", "ckpt"),
           ("inference", "ckpt")),
    Format("Hugging Face export", "hf/*", ("convert_checkpoint", "verify", "hf", "ckpt"), ("hf", "ckpt"),
           ("hf/README.md", "hf/SHA256SUMS")),  # people write into the first; the second is what finds the others
    Format("converted checkpoint's tokenizer", "back/tokenizer/*", ("inspect_checkpoint", "verify", "back"), ("back",),
           ("back/tokenizer/SHA256SUMS",)),
)  # fmt: skip


@dataclass
class Found:
    """Tried and found, by format and damage; what was not found."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)

    def table(self) -> list[str]:
        lines = [f"| format | {' | '.join(HOWS)} |", f"|---|{'---|' * len(HOWS)}"]
        for row in FORMATS:
            cells = [f"{self.found[row.name, how]} of {self.tried[row.name, how]}" for how in HOWS]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        return lines


def look(
    world: Path, places: int, number: int, formats: tuple[Format, ...] = FORMATS, most: int | None = None
) -> Found:
    """Damages each file of the formats, or `most` of a format; flips and cuts at so many places of it."""
    rng, result = random.Random(number), Found()
    for row in formats:
        files = sorted(path.relative_to(world).as_posix() for path in world.glob(row.files) if path.is_file())
        mine = [name for name in files if name not in row.without]
        for file in mine if most is None else rng.sample(mine, min(most, len(mine))):
            others = [name for name in files if name != file and Path(name).suffix == Path(file).suffix]
            done = [Damage(file, how, rng.randrange(PARTS)) for how in ("flip", "cut") for _ in range(places)]
            done += [Damage(file, "delete"), *(Damage(file, "swap", other=other) for other in others[:1])]
            for damage in done:
                _look(world, row, damage, result)
    return result


def _look(world: Path, row: Format, damage: Damage, result: Found) -> None:
    if damage.how == "swap" and (world / damage.file).read_bytes() == (world / damage.other).read_bytes():
        return  # two that are equal
    case = Case(row.name, row.command[0], row.command[1:], row.needs, (0, 1, 2), (damage,))
    ended = try_case(case, world)
    text, path = ended.out + ended.err, Path(damage.file)
    names = [path.name, Path(damage.other or "?").name, path.stem]
    # A hash that does not fit may be that of the file or of its manifest's entry: the source is named.
    names += [path.parent.name] if row.name == "dataset" else []
    is_named = any(name in " ".join(text.split()) for name in names)
    result.tried[row.name, damage.how] += 1
    if ended.status in (1, 2) and is_named and "Traceback" not in text:
        result.found[row.name, damage.how] += 1
    else:
        result.missed.append(f"{row.name}: {damage}: status {ended.status}: {text.strip()[-200:]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="the table into docs/hostile-files.md")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rot-world-") as name:
        result = look(make_world(Path(name)), asked.places, asked.seed)
    for line in result.missed:
        sys.stdout.write(f"MISSED {line}\n")
    table = "\n".join(result.table())
    sys.stdout.write(table + "\n")
    if asked.write:
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    return int(bool(result.missed))


if __name__ == "__main__":
    sys.exit(main())
