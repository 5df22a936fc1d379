"""An estimate and a search as tables for people: a unit in every column or row."""

from rich.table import Table
from rich.text import Text

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.planner.bottleneck import MOVES
from gpt4moe.planner.estimate import Estimate
from gpt4moe.planner.search import Search

LINES = ("weights", "gradients", "optimizer", "activations", "buffers", "reserve", "total")


def estimate_tables(result: Estimate) -> list[Table | str]:
    """The plan of one layout."""
    warned = [f"warning: {text}" for text in result.warnings]
    return [
        f"{result.plan.model.name} on {result.layout.describe()} of {result.plan.cluster.name}",
        _parameters(result),
        _memory(result),
        _time(result),
        _whole(result),
        f"bottleneck: {result.bottleneck}",
        *warned,
    ]


def search_tables(result: Search) -> list[Table | str]:
    """The layouts that fit, fastest first."""
    best = result.found[0]
    model, cluster = best.plan.model.name, best.plan.cluster
    table = _table(
        "Layouts, fastest first",
        "tp", "pp", "vpp", "cp", "ep", "etp", "dp", "micro-batch [seq]", "recompute", "step [s]", "MFU [%]",
        "tokens/s/GPU", "memory [GB]", "headroom [GB]", "days", "cost [USD]", "largest cost beside products",
    )  # fmt: skip
    for found in result.found:
        layout, plan = found.layout, found.plan
        others = {part: seconds for part, seconds in found.step.parts.items() if part != "products"}
        worst = max(others, key=others.__getitem__)
        table.add_row(
            *(str(getattr(layout, name)) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")),
            str(plan.training.micro_batch_size), _recompute(plan.parallel), f"{found.step.seconds:.3g}",
            f"{found.mfu:.1%}".rstrip("%"), f"{found.tokens_per_second / layout.world_size:.4g}",
            f"{found.peak_memory_bytes / 1e9:.1f}", f"{found.headroom_bytes / 1e9:.1f}", f"{found.days:.3g}",
            f"{found.cost.usd:,.0f}", f"{worst} {others[worst] / found.step.seconds:.0%}",
        )  # fmt: skip
    slower = "" if result.is_complete else "; the others are slower than what is shown"
    head = (
        f"{model} on {result.gpus} x {cluster.name}: {result.legal} legal layouts, of which {result.may_fit} may "
        f"fit by a lower bound of their memory; that of the fastest {result.checked} was worked out in full, and "
        f"{len(result.found)} fit{slower}"
    )
    lines: list[Table | str] = [head, table, f"bottleneck of the first: {best.bottleneck}"]
    if result.tokens is not None:
        limits = [f"{best.plan.budget_usd:,.0f} USD" if best.plan.budget_usd is not None else ""]
        limits += [f"{best.plan.days:g} days" if best.plan.days is not None else ""]
        lines.append(f"{' and '.join(filter(None, limits))} train {result.tokens:.3g} tokens with the first layout")
    return lines


def _recompute(parallel: ParallelConfig) -> str:
    some = parallel.recompute_layers
    return parallel.recompute.value if some is None else f"{parallel.recompute.value}, {some} a stage"


def rows_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    """A table of cells that are ready."""
    table = _table(title, *columns)
    for row in rows:
        table.add_row(*row)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(Text(first))  # as text: "[s]" would be taken for markup
    for column in columns:
        table.add_column(Text(column), justify="right")
    return table


def _parameters(result: Estimate) -> Table:
    table = _table("Parameters and operations", "what", "number", "unit")
    count, flops, tokens = result.parameters, result.flops, result.tokens
    for name, size in count.per_component.items():
        table.add_row(name, f"{size / 1e9:,.3f}", "10^9 parameters")
    table.add_row("total", f"{count.total / 1e9:,.3f}", "10^9 parameters")
    table.add_row("active, of a token, in the layers", f"{count.active / 1e9:,.3f}", "10^9 parameters")
    rows = {
        "6N of a token": flops.layers, "... with head and attention": flops.model,
        "... with what is recomputed": flops.hardware,
    }  # fmt: skip
    for name, value in rows.items():
        table.add_row(name, f"{value / 1e12:.4g}", "TFLOP")
        whole = f"{name.replace('of a token', '').strip()} of {tokens:.3g} tokens"
        table.add_row(whole, f"{value * tokens:.4g}", "FLOP")
    return table


def _memory(result: Estimate) -> Table:
    head = ("stage", "parameters [M]", *(f"{line} [GB]" for line in LINES))
    table = _table("Memory, the fullest rank of each stage", *head)
    for stage, held in zip(result.memory, result.rank_parameters, strict=True):
        values = (getattr(stage, f"{line}_bytes") / 1e9 for line in LINES)
        table.add_row(str(stage.stage), f"{held.total / 1e6:,.1f}", *(f"{value:.2f}" for value in values))
    table.caption = f"a device has {result.plan.cluster.memory_bytes / 1e9:.1f} GB"
    return table


def _time(result: Estimate) -> Table:
    table = _table("A step, along the busiest stage", "part", "time [s]", "share [%]", "waits for")
    for part, seconds in result.step.parts.items():
        table.add_row(part, f"{seconds:.4g}", f"{100 * seconds / result.step.seconds:.1f}", MOVES[part][0])
    table.add_row("step", f"{result.step.seconds:.4g}", "100.0", "")
    return table


def _whole(result: Estimate) -> Table:
    table = _table("The run", "what", "number", "unit")
    run, cost = result.run, result.cost

    def lost(seconds_a_step: float) -> float:
        return 100 * seconds_a_step * result.plan.training.steps / run.seconds

    rows = [
        ("throughput", f"{result.tokens_per_second:,.4g}", "tokens/s"),
        ("throughput of a device", f"{result.tokens_per_second / result.layout.world_size:,.4g}", "tokens/s"),
        ("MFU (with attention, without recompute)", f"{100 * result.mfu:.1f}", "% of the dense peak"),
        ("steps", f"{result.plan.training.steps:,}", "steps"),
        ("tokens", f"{result.tokens:.4g}", "tokens"),
        ("lost to saving", f"{lost(run.checkpoint_seconds):.2f}", "% of the time"),
        ("lost to unexpected stops", f"{lost(run.failure_seconds):.1f}", "% of the time"),
        ("time", f"{result.days:.4g}", "days"),
        ("device hours", f"{cost.gpu_hours:,.4g}", "h"),
        ("cost", f"{cost.usd:,.0f}", "USD"),
        ("energy, servers included", "not known" if cost.kwh is None else f"{cost.kwh:,.4g}", "kWh"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table
