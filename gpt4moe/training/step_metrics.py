"""What a step's result says, as metrics: losses of data sources, and the routing of the MoE layers."""

from gpt4moe.config.run import RunConfig
from gpt4moe.moe import statistics
from gpt4moe.runlog.metrics import Record
from gpt4moe.training.step import StepResult


def routing_metrics(run: RunConfig, result: StepResult) -> Record:
    """moe.statistics.LAYER_METRICS of one step."""
    layers = [index for index, is_moe in enumerate(run.model.moe_layers) if is_moe]
    return dict(statistics.routing_metrics(result.routing, layers, run.model.moe.top_k if run.model.moe else 0))


def source_losses(name: str, result: StepResult, source_names: list[str]) -> Record:
    """Token mean of each data source that has tokens in this result; nothing where there is one source alone."""
    if not result.sources.numel():
        return {}
    sums = zip(source_names, *result.sources.tolist(), strict=True)
    return {f"{name}/{source}": loss / tokens for source, loss, tokens in sums if tokens}
