"""What uneven routing costs: a MoE layer and a whole training step under eight workloads, beside what is planned.

    python -m benchmarks.routing                two ranks, one expert-parallel group, by the clock
    python -m benchmarks.routing --shared       on a machine that others use: each rank's CPU time
    python -m benchmarks.routing --ranks 1      without expert parallelism
    python -m benchmarks.routing --trace DIR    also as that run recorded it (training.record_routing), all workloads
                                                with its number of tokens and experts

benchmarks/routing_workloads.py says what each workload is. `expert` and `rank` are the rows of the busiest over the
mean, in the worst step. Bytes are those that the busiest rank sends over its expert-parallel group in a step, mean
over steps; the plan must have them exactly on every rank, in every step. Time is the slowest rank's, median over
rounds, mean over steps, also as a multiple of W0_balanced's; the plan's is such a multiple too, of the nominal CPU of
configs/cluster/cpu.yaml, and has missed where it is off by more than a tenth. Exit status 1: bytes were not exact.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from statistics import mean, median

from benchmarks.harness.process import machine
from benchmarks.routing_plan import Planned, planned
from benchmarks.routing_ranks import Seen, Steps, measure
from benchmarks.routing_workloads import BALANCED, WORKLOADS, Routed, Sizes, replayed, routed
from gpt4moe.errors import ConfigError, DataError, Gpt4MoeError
from gpt4moe.parallel.local_ranks import run_ranks
from gpt4moe.planner.routed import heat
from gpt4moe.runlog.command_line import print_error
from gpt4moe.runlog.routing_record import RecordedRouting, read_routing

DEFAULT = Sizes(num_tokens=2048, num_experts=16, top_k=2)
HIDDEN, FFN, MOE_LAYERS, LONGEST = 256, 704, 2, 256
STEPS, ROUNDS, SEED = 8, 5, 1
NEAR = 0.10
TIMEOUT_SECONDS = 1800.0
RECORDED = "recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One workload of the table, as measured and as planned."""

    plan: Planned
    ranks: list[Seen]
    baseline: list[Seen]
    """Of W0_balanced."""

    @property
    def exact(self) -> bool:
        return all(seen.bytes_sent == wanted for seen, wanted in zip(self.ranks, self.plan.bytes_sent, strict=True))

    @property
    def seconds(self) -> float:
        return _seconds(self.ranks)

    @property
    def multiple(self) -> float:
        """Of W0_balanced's time."""
        return self.seconds / _seconds(self.baseline)

    @property
    def error(self) -> float:
        return self.plan.multiple / self.multiple - 1


def _seconds(ranks: list[Seen]) -> float:
    """Of a step: the median over rounds on the rank where that is largest, mean over steps."""
    of_ranks = [[median(of_step) for of_step in zip(*seen.seconds, strict=True)] for seen in ranks]
    return mean(max(of_step) for of_step in zip(*of_ranks, strict=True))


def main(arguments: list[str]) -> int:
    """Exit status: 0 printed, 1 bytes were not as planned, 2 bad input."""
    try:
        options = _options(arguments)
        recorded = read_routing(options.trace) if options.trace else []
        sizes = _sizes(recorded, options.trace) if recorded else DEFAULT
        overrides = run_overrides(sizes, options.ranks)
        workloads = all_workloads(sizes, STEPS, recorded)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    os.environ["PYTHONWARNINGS"] = "ignore"  # of every rank; before their server starts
    asked = (overrides, workloads, options.rounds, not options.shared)
    found = run_ranks(options.ranks, measure, *asked, timeout_seconds=TIMEOUT_SECONDS)
    print(
        f"Routing workloads: {sizes.num_tokens} tokens, {sizes.num_experts} experts, top-{sizes.top_k}, "
        f"hidden {HIDDEN}, ffn {FFN}, fp32, expert parallel {options.ranks}."
    )
    print(f"{machine()}, {options.rounds} rounds{', CPU time' if options.shared else ''}")
    rows = {name: table_rows(name, overrides, workloads, found) for name in ("layer", "step")}
    for name, title in (("layer", "One MoE layer, forward and backward"), ("step", "A step, two layers")):
        _print(title, rows[name], workloads, sizes)
    return 0 if all(row.exact for of in rows.values() for row in of.values()) else 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", action="store_true", help="measure CPU time: others use this machine")
    parser.add_argument("--ranks", type=int, default=2, help="processes, one expert-parallel group")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each workload is timed")
    parser.add_argument("--trace", type=Path, help="folder of a run that recorded its routing")
    options = parser.parse_args(arguments)
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks} is below 1.", "Give 1, 2, 4 or 8.")
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds} is below 1.", f"Give 1 or more; {ROUNDS} is usual.")
    return options


def _sizes(recorded: list[RecordedRouting], folder: Path) -> Sizes:
    """Of a trace. Raises: DataError when its steps have several: a ramp, or padding."""
    found = {(sum(map(sum, it.tokens)) // it.top_k, len(it.tokens[0]), it.top_k) for it in recorded}
    if len(found) > 1:
        raise DataError(
            f"{folder}: its recorded steps have {len(found)} sizes (a ramp, or padding).",
            "Record a run whose steps are of one size.",
        )
    num_tokens, num_experts, top_k = found.pop()
    return Sizes(num_tokens=num_tokens, num_experts=num_experts, top_k=top_k)


def run_overrides(
    sizes: Sizes, ranks: int, *, hidden_size: int = HIDDEN, ffn_hidden_size: int = FFN
) -> tuple[str, ...]:
    """The run of a step: one micro-batch a rank. Raises: ConfigError when tokens or experts cannot be cut so."""
    if sizes.num_tokens % ranks or sizes.num_experts % ranks:
        raise ConfigError(
            f"--ranks {ranks} does not divide {sizes.num_tokens} tokens and {sizes.num_experts} experts.",
            f"Give a divisor of {gcd(sizes.num_tokens, sizes.num_experts)}.",
        )
    own = sizes.num_tokens // ranks
    length = max(length for length in range(1, LONGEST + 1) if own % length == 0)
    return (
        "+experiment=tiny", "data=mock", "cluster=cpu", f"model.num_layers={MOE_LAYERS}",
        f"model.hidden_size={hidden_size}",
        "model.num_attention_heads=4", "model.num_query_groups=2", "model.vocab_size=2048",
        f"model.seq_length={length}",
        f"model.moe.num_experts={sizes.num_experts}", f"model.moe.top_k={sizes.top_k}",
        f"model.moe.ffn_hidden_size={ffn_hidden_size}", f"training.micro_batch_size={own // length}",
        f"training.global_batch_size={sizes.num_tokens // length}", f"parallel.ep={ranks}", "run.name=routing",
    )  # fmt: skip


def all_workloads(sizes: Sizes, steps: int, recorded: list[RecordedRouting]) -> dict[str, Steps]:
    """The eight, and the last recorded steps, if any. Raises: DataError when no routing has the recorded counts."""
    made: dict[str, Steps] = {
        name: [[routed(name, sizes, seed=SEED, step=step)] for step in range(steps)] for name in WORKLOADS
    }
    of_steps: dict[int, list[Routed]] = {}
    for it in recorded:
        try:
            of_steps.setdefault(it.step, []).append(replayed(it.tokens, it.top_k))
        except ValueError as error:
            raise DataError(f"Recorded step {it.step}, layer {it.layer}: {error}.", "Record again.") from error
    return made | ({RECORDED: list(of_steps.values())[-steps:]} if recorded else {})


def table_rows(
    subject: str, overrides: tuple[str, ...], workloads: dict[str, Steps], found: list[dict[str, dict[str, Seen]]]
) -> dict[str, Row]:
    """Of "layer" or "step". found: what each rank measured."""
    seen = {name: [rank[subject][name] for rank in found] for name in workloads}
    plans = planned(subject, overrides, workloads, len(found), BALANCED)
    return {name: Row(plan=plans[name], ranks=seen[name], baseline=seen[BALANCED]) for name in workloads}


def _print(title: str, rows: dict[str, Row], workloads: dict[str, Steps], sizes: Sizes) -> None:
    ranks = len(next(iter(rows.values())).ranks)
    print(f"\n{title:36} rows  expert   rank     kB sent  planned        ms   of W0  planned   error")
    for name, row in rows.items():
        heats = [heat(one.counts(sizes.num_experts, ranks)) for step in workloads[name] for one in step]
        sent = max(mean(seen.bytes_sent) for seen in row.ranks) / 1e3
        is_near = abs(row.error) <= NEAR
        print(
            f"  {name:32}{mean(it.rows for it in heats):7.0f}  {max(it.busiest_expert for it in heats):6.2f} "
            f"{max(it.busiest_rank for it in heats):6.2f}  {sent:10.1f}  {'exact' if row.exact else 'NOT EXACT':9}"
            f"{1e3 * row.seconds:8.1f}  {row.multiple:6.2f}  {row.plan.multiple:7.2f}  {row.error:+6.0%}"
            f"{'' if is_near else '  missed'}"
        )
    missed = [name for name, row in rows.items() if abs(row.error) > NEAR]
    print(f"  target: time within {NEAR:.0%} of the plan's: {len(rows) - len(missed)} of {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
