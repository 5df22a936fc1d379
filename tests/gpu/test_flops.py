"""The planner's FLOPs of a token, behind every MFU, against torch's own counter. Needs no GPU."""

import pytest

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks


def test_products_of_a_token_are_what_torch_counts() -> None:
    """Attention apart: the counter takes it whole and its backward pass as 2.5 forwards, the planner halves and takes
    2 (tests/architecture/test_count.py holds it to the formula of the papers)."""
    (answer,) = run_ranks(1, _counted)
    assert answer["counted products"] == pytest.approx(answer["planned products"], rel=1e-6)


def _counted(environment: Environment) -> dict[str, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gpt4moe.architecture.flops import flops_per_token
    from gpt4moe.config.load import load_run_config
    from gpt4moe.model.gpt import build_model
    from tests.distributed.case import BASE
    from tests.moe.case import rank_groups

    run = load_run_config([*BASE, "model.num_layers=2"])
    model = run.model
    with rank_groups(environment) as groups:
        (chunk,) = build_model(run, groups)
        tokens, positions = (
            torch.zeros(2, model.seq_length, dtype=torch.int64, device=groups.device),
            torch.arange(model.seq_length, device=groups.device).repeat(2, 1),
        )
        with FlopCounterMode(display=False) as counter:
            chunk(tokens, positions, None, labels=tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(value for operation, value in counts.items() if "attention" not in str(operation))
    flops = flops_per_token(model)
    return {"counted products": products / tokens.numel(), "planned products": flops.layers + flops.head}
