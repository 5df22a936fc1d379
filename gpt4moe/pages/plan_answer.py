"""The answer of tools/plan.py in the requested form: tables, JSON, Markdown or an HTML page.

    PlanConfig -> estimate | search | calibrate | gpt4_claims | inference -> tables (rich), JSON, Markdown, plan.html

Every column or row of a table has its unit. It is in this room because a calibration reads a run folder,
which the planner may not.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from gpt4moe.config.load import config_from_dict
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.plan import PlanConfig, PlanOutput, PlanReport, images_per_sequence
from gpt4moe.config.yaml_text import load_yaml
from gpt4moe.errors import DataError
from gpt4moe.pages.inference_answer import inference_json, inference_tables, write_inference_page
from gpt4moe.pages.plan_page import (
    NO_PRICE,
    PHASE_COLUMNS,
    STACK,
    known_text,
    phase_rows,
    unbuilt_mark,
    with_range,
    write_plan_page,
)
from gpt4moe.pages.upkeep_rows import UPKEEP_TITLE, upkeep_section, upkeep_table
from gpt4moe.planner.calibrate import Compared, advice, calibrate
from gpt4moe.planner.diagnosis import MOVES
from gpt4moe.planner.estimate import Estimate, estimate
from gpt4moe.planner.gpt4_claims import claims, claims_page
from gpt4moe.planner.gpt4_reported import ReportedRuns
from gpt4moe.planner.inference import plan_inference
from gpt4moe.planner.plan_json import to_json
from gpt4moe.planner.search import Search, search
from gpt4moe.planner.stacks import stack_text
from gpt4moe.planner.states import trained_tensors
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics

MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "images", "buffers", "reserve", "total")


def plan_answer(plan: PlanConfig) -> dict[str, object] | str | list[Table | str]:
    """A dictionary for JSON, a text, or tables and sentences. output=html writes a page. Raises: Gpt4MoeError."""
    if plan.calibrate is not None:
        rows = _calibrated(plan, Path(plan.calibrate))
        return calibration_json(rows) if plan.output is PlanOutput.json else calibration_tables(rows)
    if plan.output is PlanOutput.json:
        return json_answer(plan)
    if plan.report is PlanReport.inference:
        found = plan_inference(plan)
        if plan.output is PlanOutput.html:
            write_inference_page(plan.file, found)
            return f"{plan.file}\n"
        return inference_tables(found)
    if plan.report is not None:
        return claims_page(claims(ReportedRuns.load()))
    if plan.output is PlanOutput.html:
        shown = search(plan).found[0] if plan.search else estimate(plan)  # of a search the fastest layout
        write_plan_page(plan.file, shown, {UPKEEP_TITLE: upkeep_section(shown)})
        return f"{plan.file}\n"
    return table_answer(plan)


def json_answer(plan: PlanConfig) -> dict[str, object]:
    """The report, the estimate or the search as plain data. Raises: Gpt4MoeError."""
    if plan.report is PlanReport.inference:
        return inference_json(plan_inference(plan))
    if plan.report is not None:
        return {"claims": [asdict(claim) for claim in claims(ReportedRuns.load())]}
    if not plan.search:
        return to_json(estimate(plan))
    result = search(plan)
    looked = {"may_fit": result.may_fit, "checked": result.checked, "complete": result.is_complete}
    numbers = {"gpus": result.gpus, "legal": result.legal, **looked}
    trained = {"tokens": result.tokens, "tokens_interval": result.likely_tokens, "days": result.days}
    return {**numbers, **trained, "layouts": [_layout_json(found) for found in result.found]}


def table_answer(plan: PlanConfig) -> list[Table | str]:
    """The estimate or the search as tables and sentences. Raises: Gpt4MoeError."""
    return search_tables(search(plan)) if plan.search else estimate_tables(estimate(plan))


def calibration_tables(rows: Sequence[Compared]) -> list[Table | str]:
    """Planned and measured side by side, then the advice."""
    table = _table("Planned and measured", "what", "predicted", "measured", "unit", "error [%]")
    for row in rows:
        error = "unlike" if row.error is None else f"{100 * row.error:+.1f}"
        table.add_row(row.name, f"{row.predicted:.4g}", f"{row.measured:.4g}", row.unit, error)
    return [table, *advice(rows)]


def calibration_json(rows: Sequence[Compared]) -> dict[str, object]:
    """A key for each row, and the advice. error is a share, or null (with the reason) if there is none."""
    compared = {row.name: {**asdict(row), "error": row.error} for row in rows}
    return {**compared, "advice": advice(rows)}


def _calibrated(plan: PlanConfig, folder: Path) -> list[Compared]:
    """The plan of a run folder's last launch (its config and ranks) against its metrics. Raises: DataError."""
    launches = sorted((folder / "starts").glob("*.yaml"))
    if not launches or not (folder / METRICS_FILE).exists():
        raise DataError(
            f"calibrate={folder} is no run folder: it lacks starts/ or metrics.jsonl.",
            "Give the folder of a run, runs/<run.name>.",
        )
    try:
        last = load_yaml(launches[-1].read_text())
        config, ranks = dict(last["config"]), int(last["ranks"])
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{launches[-1]} is damaged: it is no record of a start with its config and ranks.",
            "Calibrate another run, or start this one once more: each start writes its own record.",
        ) from error
    run = config_from_dict(config)
    # The run's own config overrides the plan's, except for the planner's own keys.
    groups = {name: getattr(run, name) for name in type(run).__dataclass_fields__}
    return calibrate(replace(plan, **groups, gpus=ranks), read_metrics(folder / METRICS_FILE))


def _layout_json(found: Estimate) -> dict[str, object]:
    training, parallel = found.plan.training, found.plan.parallel
    cut = {"recompute": parallel.recompute.value, "recompute_layers": parallel.recompute_layers}
    return {"micro_batch_size": training.micro_batch_size, **cut, **to_json(found)}


def estimate_tables(result: Estimate) -> list[Table | str]:
    """The plan of one layout."""
    warned = [f"warning: {text}" for text in result.warnings]
    return [
        f"{result.plan.model.name} on {result.layout.describe()} of {result.plan.cluster.name}; {STACK}: "
        f"{stack_text(result.plan)}{unbuilt_mark(result)}",
        _parameters(result),
        *([_images(result)] if result.images is not None else []),
        _memory(result),
        _time(result),
        _whole(result),
        *([_phases(result)] if len(result.phases) > 1 else []),
        upkeep_table(result),
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
        "tokens/s/GPU", "memory [GB]", "headroom [GB]", "days", "cost [USD]", "largest cost beside products", "trainer",
    )  # fmt: skip
    for found in result.found:
        layout, plan = found.layout, found.plan
        others = {part: seconds for part, seconds in found.step.parts.items() if part != "products"}
        worst = max(others, key=others.__getitem__)
        table.add_row(
            *(str(getattr(layout, name)) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")),
            str(plan.training.micro_batch_size), _recompute(plan.parallel),
            with_range(f"{found.step.seconds:.3g}", found.likely(found.step.seconds)),
            f"{found.mfu:.1%}".rstrip("%"), f"{found.tokens_per_second / layout.world_size:.4g}",
            f"{found.peak_memory_bytes / 1e9:.1f}", f"{found.headroom_bytes / 1e9:.1f}",
            with_range(f"{found.days:.3g}", found.likely(found.days)),
            with_range(known_text(found.cost.usd), found.likely(found.cost.usd), ",.0f"),
            f"{worst} {others[worst] / found.step.seconds:.0%}",
            "cannot build it" if found.unbuilt else "builds it",
        )  # fmt: skip
    slower = "" if result.is_complete else "; the others are slower than what is shown"
    head = (
        f"{model} on {result.gpus} x {cluster.name}: {result.legal} legal layouts, of which {result.may_fit} may "
        f"fit by a lower bound of their memory; that of the fastest {result.checked} was worked out in full, and "
        f"{len(result.found)} fit{slower}; {STACK}: {stack_text(best.plan)}"
    )
    if best.interval is not None:
        low, high = best.interval.around(1.0)
        table.caption = (
            f"by the errors of {best.interval.rows} published rows ({best.interval.of}) a step, its days and its cost "
            f"may be {low:.2f} to {high:.2f} times what stands here"
        )
    lines: list[Table | str] = [head, table, f"bottleneck of the first: {best.bottleneck}"]
    lines += [f"cost {NO_PRICE}"] if best.cost.usd is None else []
    lines += [f"warning, of the first: {text}" for text in best.warnings]
    if result.tokens is not None:
        limits = [f"{best.plan.budget_usd:,.0f} USD" if best.plan.budget_usd is not None else ""]
        limits += [f"{best.plan.days:g} days" if best.plan.days is not None else ""]
        trained = with_range(f"{result.tokens:.3g}", result.likely_tokens)
        spent = " and ".join(filter(None, limits))
        lines.append(f"{spent} train {trained} tokens with the first layout, in {result.days:.3g} days")
    return lines


def _recompute(parallel: ParallelConfig) -> str:
    some = parallel.recompute_layers
    return parallel.recompute.value if some is None else f"{parallel.recompute.value}, {some} a stage"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(Text(first))  # as Text: rich would read "[s]" as markup
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
    # With frozen weights 2 operations an element, or 4 with the gradient of the input.
    layers = "6N of a token" if trained_tensors(result.plan) is None else "2N to 6N of a token"
    again = "... with what parallel.recompute repeats"
    rows = {layers: "layers", "... with head and attention": "model", again: "hardware"}
    for name, kind in rows.items():
        value = getattr(flops, kind)
        table.add_row(name, f"{value / 1e12:.4g}", "TFLOP")
        whole = f"{name.replace('of a token', '').strip()} of {tokens:.3g} tokens"
        table.add_row(whole, f"{result.total_flops(kind):.4g}", "FLOP")
    return table


def _images(result: Estimate) -> Table:
    """Of a vision model: what its images are assumed to be, and what they cost."""
    table = _table("Images: every rank has encoder and resampler", "what", "number", "unit")
    plan, flops, vision = result.plan, result.images, result.plan.model.vision
    assert vision is not None and flops is not None
    encoder, images = vision.encoder, images_per_sequence(plan)
    per_token = flops.total / plan.model.seq_length
    for row in (
        ("images of a sequence, assumed", f"{images:g}", "images"),
        ("pixels of an image", f"{encoder.image_size} x {encoder.image_size}", "pixels"),
        ("latents of an image", f"{vision.resampler.num_latents}", "latents"),
        ("encoder, frozen, beside the model", f"{result.encoder_parameters / 1e9:,.3f}", "10^9 parameters"),
        ("encoder, of a sequence", f"{flops.encoder / 1e12:.4g}", "TFLOP"),
        ("resampler, of a sequence", f"{flops.resampler / 1e12:.4g}", "TFLOP"),
        ("attention to latents, of a sequence", f"{flops.gated / 1e12:.4g}", "TFLOP"),
        ("all of them, over those of the text", f"{100 * per_token / result.flops.model:.2g}", "%"),
    ):
        table.add_row(*row)
    return table


def _memory(result: Estimate) -> Table:
    has_images = any(stage.images_bytes for stage in result.memory)
    columns = [line for line in MEMORY_COLUMNS if line != "images" or has_images]
    table = _table("Memory, the fullest rank of each stage", "stage", "parameters [M]", *(f"{c} [GB]" for c in columns))
    for stage, held in zip(result.memory, result.rank_parameters, strict=True):
        values = (getattr(stage, f"{line}_bytes") / 1e9 for line in columns)
        table.add_row(str(stage.stage), f"{held.total / 1e6:,.1f}", *(f"{value:.2f}" for value in values))
    table.caption = f"a device has {result.plan.cluster.memory_bytes / 1e9:.1f} GB"
    return table


def _time(result: Estimate) -> Table:
    table = _table("A step, along the busiest stage", "part", "time [s]", "share [%]", "waits for")
    for part, seconds in result.step.parts.items():
        table.add_row(part, f"{seconds:.4g}", f"{100 * seconds / result.step.seconds:.1f}", MOVES[part][0])
    table.add_row("step", with_range(f"{result.step.seconds:.4g}", result.likely(result.step.seconds)), "100.0", "")
    return table


def _phases(result: Estimate) -> Table:
    table = _table("The run, phase by phase", PHASE_COLUMNS[0], *PHASE_COLUMNS[1:])
    for row in phase_rows(result):
        table.add_row(*row)
    return table


def _whole(result: Estimate) -> Table:
    table = _table("The run", "what", "number", "unit")
    run, cost, kwh = result.run, result.cost, known_text(result.cost.kwh, ",.4g")

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
        ("time", with_range(f"{result.days:.4g}", result.likely(result.days)), "days"),
        ("device hours", with_range(f"{cost.gpu_hours:,.4g}", result.likely(cost.gpu_hours), ",.4g"), "h"),
        ("cost", with_range(known_text(cost.usd, missing=NO_PRICE), result.likely(cost.usd), ",.0f"), "USD"),
        ("energy, servers included", with_range(kwh, result.likely(cost.kwh), ",.4g"), "kWh"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table
