"""The planner's FLOPs of a token, behind every MFU, against torch's own counter. Needs no GPU."""

from functools import cache

import pytest

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

CASES = {
    "all trained": (),
    "adapters": ("stage.lora.rank=4",),
    "the second layer and the output": ("stage.train=['decoder.layers.1.*','output_layer.weight']",),
    "the output alone": ("stage.train=['output_layer.weight']",),
    "the embedding alone": ("stage.train=['embedding.*']",),
}


@cache
def counted() -> dict[str, dict[str, float]]:
    (answer,) = run_ranks(1, _counted)
    return answer


@pytest.mark.parametrize("case", CASES)
def test_products_of_a_token_are_what_torch_counts(case: str) -> None:
    """Attention apart: the counter takes it whole and its backward pass as 2.5 forwards, the planner halves and takes
    2 (tests/architecture/test_count.py holds it to the formula of the papers)."""
    answer = counted()[case]
    # Megatron's linear layer computes the gradient of its input even if nobody needs it: here for the output layer.
    needless = answer["head"] / 3 if case == "the output alone" else 0
    assert answer["counted products"] == pytest.approx(answer["planned products"] + needless, rel=1e-6)


def test_scores_below_the_first_trained_tensor_have_no_backward_pass() -> None:
    planned = {case: answer["planned attention"] for case, answer in counted().items()}
    assert planned["adapters"] == planned["all trained"] == 3 * planned["the output alone"]
    assert planned["the second layer and the output"] == pytest.approx(4 * planned["the output alone"] / 2)


def _counted(environment: Environment) -> dict[str, dict[str, float]]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gpt4moe.architecture.flops import flops_per_token
    from gpt4moe.architecture.trained import trained_names
    from gpt4moe.config.load import load_run_config
    from gpt4moe.model.gpt import build_model
    from tests.distributed.case import BASE
    from tests.moe.case import rank_groups

    answers = {}
    with rank_groups(environment) as groups:
        for case, overrides in CASES.items():
            run = load_run_config([*BASE, "model.num_layers=2", *overrides])
            model = run.model
            (chunk,) = build_model(run, groups)
            tokens, positions = (
                torch.zeros(2, model.seq_length, dtype=torch.int64, device=groups.device),
                torch.arange(model.seq_length, device=groups.device).repeat(2, 1),
            )
            with FlopCounterMode(display=False) as counter:
                chunk(tokens, positions, None, labels=tokens).sum().backward()
            counts = counter.get_flop_counts()["Global"]
            products = sum(value for operation, value in counts.items() if "attention" not in str(operation))
            flops = flops_per_token(model, trained=trained_names(model, run.stage) if overrides else None)
            answers[case] = {
                "counted products": products / tokens.numel(),
                "planned products": flops.layers + flops.head,
                "planned attention": flops.attention,
                "head": flops_per_token(model).head,
            }
    return answers
