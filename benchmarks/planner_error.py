"""Predicted against published step times: the planner's error, row by row, with its misses.

    python -m benchmarks.planner_error           the table, with the constants of planner/efficiency.py
    python -m benchmarks.planner_error fit       the constants found anew (a minute)
    python -m benchmarks.planner_error left-out  every row predicted by constants fitted without it, and every source
                                                 by constants fitted without any of its rows (minutes; or of the stacks
                                                 and sources named after it); writes
                                                 benchmarks/planner_error_left_out.json, which the table shows

Rows, sources and assumptions are in planner_error.yaml. A stack's constants are shared by all its rows; only the share
of the peak that large products reach differs between hardware generations. No constant belongs to a row.
"""

import json
import sys
from statistics import median

from benchmarks.planner_error_fit import (
    FITTED,
    HELD_OUT,
    Cell,
    errors,
    fit,
    fitted_rows,
    left_out,
    planned_elsewhere,
    predict,
    source_left_out,
    sources,
)
from benchmarks.planner_error_rows import HERE, Row, rows
from gpt4moe.config.beyond import Dispatch
from gpt4moe.config.cluster import Generation
from gpt4moe.errors import ConfigError
from gpt4moe.planner.efficiency import PROFILES
from gpt4moe.runlog.command_line import print_error

LEFT_OUT = HERE / "planner_error_left_out.json"


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    ranks = [_ranks(first), _ranks(second)]
    mean = (len(first) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
    spread = [sum((rank - mean) ** 2 for rank in one) for one in ranks]
    return covariance / (spread[0] * spread[1]) ** 0.5


def _ranks(values: list[float]) -> list[float]:
    return [(sum(o < v for o in values) + sum(o <= v for o in values) + 1) / 2 for v in values]


def comparable() -> dict[str, list[Row]]:
    """Rows that differ in their layout alone: same source, model, devices and batch; three or more."""
    groups: dict[str, list[Row]] = {}
    for row in rows():
        key = f"{row.source}: {row.model.name}, {row.devices} devices, batch {row.training.global_batch_size}"
        groups.setdefault(f"{key} x {row.model.seq_length}, {row.cluster.name}", []).append(row)
    return {key: group for key, group in groups.items() if len(group) > 2}


def table() -> str:
    """Markdown: every row, then the summaries."""
    kept = stored()
    lines = ["| source | run | published s | predicted s | error | row left out | source left out |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row, error in zip(rows(), errors(rows(), PROFILES), strict=True):
        predicted = row.seconds * (1 + error)
        alone = f"{kept['row'][row.name]:+.1%}" if row.name in kept["row"] else "never fitted"
        lines.append(
            f"| {row.source} | {row.name} | {row.seconds:.3g} | {predicted:.3g} | {error:+.1%} | {alone} "
            f"| {kept['source'][row.name]:+.1%} |"
        )
    of_rows = [*_stacks(kept["row"]), "", *_of_stacks(kept["row"])]
    return "\n".join([*lines, "", *of_rows, "", *_strangers(kept["source"]), "", *_ranking()])


def stored() -> dict[str, dict[str, float]]:
    """Stored errors. row: each fitted row, left out of its stack's fit. source: each row, its whole source left out."""
    found: dict[str, dict[str, float]] = json.loads(LEFT_OUT.read_text())
    return found


def _stacks(kept: dict[str, float]) -> list[str]:
    lines = [
        "| stack | rows | constants | median error | row left out | worst, row left out |",
        "|---|---|---|---|---|---|",
    ]
    whole: list[float] = []
    for stack in FITTED:
        mine = fitted_rows(stack)
        now, without = [abs(e) for e in errors(mine, PROFILES)], [abs(kept[row.name]) for row in mine]
        constants = len(FITTED[stack]) - 1 + len({row.profile for row in mine})
        whole += without
        lines.append(
            f"| {stack} | {len(mine)} | {constants} | {median(now):.1%} | {median(without):.1%} | {max(without):.1%} |"
        )
    unseen = [abs(e) for e in errors([row for row in rows() if row.source in HELD_OUT], PROFILES)]
    lines.append(f"| never fitted | {len(unseen)} | 0 | {median(unseen):.1%} | | {max(unseen):.1%} |")
    whole_said = f"All {len(whole)} fitted rows, each left out of its stack's fit: {_said(whole)}."
    return [*lines, "", f"{whole_said} {_of_dispatchers()}"]


def _of_stacks(kept: dict[str, float]) -> list[str]:
    """The intervals of stack=: signed errors of its rows, each left out, by generation, kind and precision."""
    found: dict[tuple[str, Cell], list[float]] = {}
    for row in rows():
        if row.name in kept:
            cell = (row.cluster.generation, "experts" if row.model.moe else "dense", row.precision)
            found.setdefault((row.stack, cell), []).append(kept[row.name])
    lines = ["| stack= | planned on | kind | precision | rows | least error | median | most |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (stack, (generation, kind, precision)), of in found.items():
        lines.append(f"| {stack} | {generation.value} | {kind} | {precision} | {len(of)} | {_signed(of)} |")
    return lines


def by_dispatcher() -> dict[Dispatch, list[float]]:
    """Signed errors of rows whose dispatcher is not their stack's own: left out of its fit, or never fitted."""
    found: dict[Dispatch, list[float]] = {one: [] for one in Dispatch}
    of_rows = stored()["row"]
    for row, now in zip(rows(), errors(rows(), PROFILES), strict=True):
        if row.dispatch is not None:
            found[row.dispatch].append(of_rows.get(row.name, now))
    return found


def _of_dispatchers() -> str:
    said = [f"{one.value} {len(of)} rows, {min(of):+.1%} to {max(of):+.1%}" for one, of in by_dispatcher().items()]
    return f"Rows with another dispatcher than their stack's: {'; '.join(said)}."


def _signed(found: list[float]) -> str:
    return " | ".join(f"{error:+.1%}" for error in (min(found), median(found), max(found)))


def _strangers(kept: dict[str, float]) -> list[str]:
    """Summaries of errors under constants that no row of the same source was fitted to."""
    lines = ["| source left out | rows | median error | worst |", "|---|---|---|---|"]
    for source in sources():
        mine = [abs(kept[row.name]) for row in rows() if row.source == source]
        lines.append(f"| {source} | {len(mine)} | {median(mine):.1%} | {max(mine):.1%} |")
    lines += ["", f"All {len(kept)} rows, each with its whole source left out: {_said(list(kept.values()))}.", ""]
    lines += ["| planned on | kind | precision | rows of other sources | least error | median | most |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (generation, kind, precision), found in sorted(planned_elsewhere().items(), key=_cell_order):
        lines.append(f"| {generation.value} | {kind} | {precision} | {len(found)} | {_signed(found)} |")
    return lines


def _cell_order(cell: tuple[Cell, list[float]]) -> tuple[int, str, str]:
    (generation, kind, precision), _ = cell
    return list(Generation).index(generation), kind, precision


def _said(found: list[float]) -> str:
    sizes = [abs(error) for error in found]
    beyond = sum(size > 0.25 for size in sizes)
    return f"median {median(sizes):.1%}, worst {max(sizes):.1%}, {beyond} beyond 25%"


def rankings() -> list[float]:
    """Spearman of each comparable group."""
    return [
        spearman([row.seconds for row in group], [predict(row, PROFILES[row.profile]) for row in group])
        for group in comparable().values()
    ]


def _ranking() -> list[str]:
    ranked = rankings()
    good = sum(value >= 0.8 for value in ranked)
    return [
        f"Ranking of layouts: {len(ranked)} groups of three or more that differ in layout alone, Spearman mean "
        f"{sum(ranked) / len(ranked):.2f}, lowest {min(ranked):.2f}, {good} of {len(ranked)} at 0.8 or more."
    ]


def write_left_out(names: list[str]) -> None:
    """Fits anew what is named (stacks, sources; all by default) and stores it beside what is there."""
    kept = stored() if LEFT_OUT.exists() else {"row": {}, "source": {}}
    for kind, found, known in (("row", left_out, list(FITTED)), ("source", source_left_out, sources())):
        for name in known:
            if not names or name in names:
                kept[kind] |= {row: round(error, 4) for row, error in found(name).items()}
    order = [row.name for row in rows()]  # others are gone
    kept = {kind: {name: of[name] for name in order if name in of} for kind, of in kept.items()}
    LEFT_OUT.write_text(json.dumps(kept, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Exit status: 0 printed or written, 2 bad input."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        _require_known(arguments)
    except ConfigError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    if arguments == ["fit"]:
        for stack in FITTED:
            for name, profile in fit(stack, fitted_rows(stack)).items():
                print(name, profile)
    elif arguments:
        write_left_out(arguments[1:])
    else:
        print(table())
    return 0


def _require_known(arguments: list[str]) -> None:
    """Raises: ConfigError for an unknown command, stack or source."""
    asked, names = arguments[:1], arguments[1:]
    if asked not in ([], ["fit"], ["left-out"]) or (asked == ["fit"] and names):
        raise ConfigError(
            f"{' '.join(arguments)} is no command of this benchmark.",
            "Give nothing (the table), fit, or left-out with stacks or sources; --help says what each does.",
        )
    known = [*FITTED, *sources()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"left-out {unknown[0]}: no stack or source of that name.", f"Known: {', '.join(known)}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
