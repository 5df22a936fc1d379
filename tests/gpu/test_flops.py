"""The planner's FLOPs of a token, behind every MFU, against torch's own counter. Needs no GPU."""

from functools import cache

import pytest

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

# A gated block before layers 1 and 3 of three, counted from 1.
VISION = (
    "stage=vision", "+vision@model.vision=tiny", "model.vision.cross_attention_every=2", "model.num_layers=3",
    "optimizer.by_pattern=[]",
)  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {
    "all trained": (),
    "adapters": ("stage.lora.rank=4",),
    "the second layer and the output": ("stage.train=['decoder.layers.1.*','output_layer.weight']",),
    "the output alone": ("stage.train=['output_layer.weight']",),
    "the embedding alone": ("stage.train=['embedding.*']",),
    "vision parts": VISION,
    "the resampler alone": (*VISION, "stage.train=['resampler.*']"),
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
    from gpt4moe.architecture.image_flops import image_flops
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
            chunk, *resampler = build_model(run, groups)
            tokens, positions = (
                torch.zeros(2, model.seq_length, dtype=torch.int64, device=groups.device),
                torch.arange(model.seq_length, device=groups.device).repeat(2, 1),
            )
            vision, images = model.vision, {}
            if vision is not None:
                latents = torch.zeros(vision.resampler.num_latents, len(tokens), vision.width)
                latents.requires_grad_(any(parameter.requires_grad for parameter in resampler[0].parameters()))
                images = {"extra_block_kwargs": {"context": latents, "context_mask": torch.ones_like(tokens)}}
            with FlopCounterMode(display=False) as counter:
                chunk(tokens, positions, None, labels=tokens, **images).sum().backward()
            counts = counter.get_flop_counts()["Global"]
            products = sum(value for operation, value in counts.items() if "attention" not in str(operation))
            trained = trained_names(model, run.stage) if overrides else None
            flops, of_latents = flops_per_token(model, trained=trained), 0.0
            if vision is not None:
                heads, layers = model.num_attention_heads * model.head_size, range(0, model.num_layers, 2)
                scores = 3 * 4.0 * vision.resampler.num_latents * heads * len(layers)
                of_latents = image_flops(model, 1, trained).gated / model.seq_length - scores
            answers[case] = {
                "counted products": products / tokens.numel(),
                "planned products": flops.layers + flops.head + of_latents,
                "planned attention": flops.attention,
                "head": flops_per_token(model).head,
            }
    return answers
