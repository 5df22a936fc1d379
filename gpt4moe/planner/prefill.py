"""Prefill: time to the first token, and throughput of prompts.

    prompts of a burst, packed -> chunks of tokens -> forward pass of each stage, as layer_time times training's
    first token = the first chunk passes all stages, the others follow at the pace of the slowest stage

Prompts are long, so matrix products bind. Scores of a chunk are counted as the mean over the prompt. The output layer,
which sees one token of each prompt, is left out.
"""

from dataclasses import dataclass, replace

from gpt4moe.planner.layer_time import forward_seconds
from gpt4moe.planner.serving import ALL_REDUCE_SECONDS, ServedModel, ServingLayout, stages_of
from gpt4moe.planner.step_time import message_seconds
from gpt4moe.planner.work import TimedKind, timed_kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """A burst of prompts that come at once, in each copy."""

    prompts: int
    """In each copy."""
    first_token_seconds: float
    """Until the last prompt's first token."""
    tokens_per_second: float
    """Prompt tokens of all copies, over that time."""
    steady_tokens_per_second: float
    """The same without end: prompt follows prompt in full chunks, and no stage waits."""


def prefill(
    served: ServedModel, layout: ServingLayout, *, prompts: int, prompt_tokens: int, chunk_tokens: int
) -> Prefill:
    """Prompts of equal length. Where copies share experts, all of them have such a burst."""
    tokens = prompts * prompt_tokens
    chunk = min(chunk_tokens, tokens)
    seconds = stage_seconds(served, layout, prompt_tokens=prompt_tokens, chunk=chunk)
    total = sum(seconds) + (tokens / chunk - 1) * max(seconds)
    full = stage_seconds(served, layout, prompt_tokens=prompt_tokens, chunk=chunk_tokens)
    return Prefill(
        prompts=prompts, first_token_seconds=total, tokens_per_second=layout.copies * tokens / total,
        steady_tokens_per_second=layout.copies * chunk_tokens / max(full),
    )  # fmt: skip


def stage_seconds(served: ServedModel, layout: ServingLayout, *, prompt_tokens: int, chunk: int) -> list[float]:
    """Seconds that each stage takes for one chunk: [pp]."""
    work = served.work(layout, chunk)
    kinds = timed_kinds(replace(served.model, seq_length=prompt_tokens))
    known: dict[int, float] = {}

    def of_layer(kind: TimedKind) -> float:
        if id(kind) not in known:
            known[id(kind)] = sum(forward_seconds(work, kind).values())
        return known[id(kind)]

    message = (message_seconds(work) + ALL_REDUCE_SECONDS) * (layout.pp > 1)
    return [
        sum(count * of_layer(kinds[layer]) for layer, count in stage.kinds) + message
        for stage in stages_of(served, layout.pp)
    ]
