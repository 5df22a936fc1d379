"""Resampler and gated cross-attention against transformers' Idefics, on the same weights, in value and gradient."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.environment import Environment
from tests.distributed.vision import VISION
from tests.moe.case import rank_groups
from tests.spawn import run_ranks

TOLERANCE = 1e-5


def _compared(environment: Environment) -> dict[str, float]:
    """What is compared -> the largest difference, as a share of the reference's largest number."""
    import torch
    from transformers.models.idefics.configuration_idefics import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    from gpt4moe.model.gpt import build_model

    # A gate's gradient is one sum of terms of both signs: of one in 60 seeds it is so small that rounding counts.
    torch.manual_seed(1)
    run = load_run_config([*VISION, "stage.train=[]"])
    vision = run.model.vision
    assert vision is not None
    hidden, heads, width = run.model.hidden_size, run.model.num_attention_heads, vision.width
    config = IdeficsConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=vision.ffn_hidden_size, hidden_act="silu",
        rms_norm_eps=run.model.norm_epsilon, dropout=0.0, alpha_type="float", qk_layer_norms=False,
        vision_config={"embed_dim": width}, perceiver_config={"qk_layer_norms_perceiver": False},
        attn_implementation="eager",
    )  # fmt: skip
    settings = vision.resampler
    reference = IdeficsPerceiverResampler(
        config, width, settings.num_layers, settings.num_attention_heads, width // settings.num_attention_heads,
        settings.num_latents,
    )  # fmt: skip
    gated = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    with rank_groups(environment) as groups, torch.enable_grad():
        *_, vision_chunk = chunks = build_model(run, groups)
        found: dict[str, float] = {}
        _compare_resampler(found, vision_chunk.resampler, reference, width)
        block = chunks[0].decoder.layers[0].gated_cross_attention
        _compare_block(found, block, gated, (hidden, heads, width, settings.num_latents))
        return found


def _compare_resampler(found: dict[str, float], ours: Any, theirs: Any, width: int) -> None:
    import torch

    _take_resampler(ours, theirs)
    with torch.no_grad():
        ours.final_layernorm.weight.uniform_(0.5, 1.5)
        theirs.layer_norm.weight.copy_(ours.final_layernorm.weight)
    _compare(found, "resampler", lambda x: ours(x, [1, 1, 1]), theirs, torch.randn(3, 4, width))
    for layer, (attention, mlp) in enumerate(theirs.blocks):
        own = ours.layers[layer]
        key_value = torch.cat((attention.k_proj.weight.grad, attention.v_proj.weight.grad))
        pairs = [
            (own.linear_q, attention.q_proj.weight.grad), (own.linear_kv, key_value),
            (own.linear_proj, attention.output_proj.weight.grad), (own.linear_fc1, mlp.fc.weight.grad),
            (own.linear_fc2, mlp.c_proj.weight.grad), (own.mlp_layernorm, mlp.ln.weight.grad),
            (own.context_layernorm, attention.context_layer_norm.weight.grad),
            (own.latents_layernorm, attention.latents_layer_norm.weight.grad),
        ]  # fmt: skip
        for number, (module, gradient) in enumerate(pairs):
            found[f"resampler {layer} {number}"] = _away(module.weight.grad, gradient)
    found["latents"] = _away(ours.latents.grad, theirs.latents.grad)


def _compare_block(found: dict[str, float], block: Any, gated: Any, sizes: tuple[int, int, int, int]) -> None:
    import torch

    hidden, heads, width, num_latents = sizes
    _take_block(block, gated, heads)
    latents = torch.randn(2 * num_latents, 2, width, requires_grad=True)
    media = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2, 2]])
    image = torch.arange(2 * num_latents) // num_latents + 1
    mask = torch.where(media.unsqueeze(-1) == image, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)
    their_latents = latents.detach().clone().requires_grad_()

    def theirs_of(x: torch.Tensor) -> torch.Tensor:
        out = gated(
            x.transpose(0, 1), image_hidden_states=their_latents.transpose(0, 1), image_attention_mask=mask,
            cross_attention_gate=(media > 0).float(),
        )  # fmt: skip
        return out.transpose(0, 1)

    _compare(found, "gated", lambda x: block(x, latents, media), theirs_of, torch.randn(8, 2, hidden))
    found["gated latents"] = _away(latents.grad, their_latents.grad)
    cross, mlp = gated.cross_attn, gated.mlp
    pairs = [
        (block.linear_q.weight, cross.q_proj.weight.grad), (block.linear_proj.weight, cross.o_proj.weight.grad),
        (block.linear_kv.weight, _by_head(cross.k_proj.weight.grad, cross.v_proj.weight.grad, heads)),
        (block.linear_fc1.weight, torch.cat((mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad))),
        (block.linear_fc2.weight, mlp.down_proj.weight.grad), (block.attention_gate, gated.alpha_cross_attn.grad),
        (block.mlp_gate, gated.alpha_dense.grad), (block.input_layernorm.weight, gated.input_layernorm.weight.grad),
        (block.pre_mlp_layernorm.weight, gated.post_attention_layernorm.weight.grad),
    ]  # fmt: skip
    found.update({f"gated {n}": _away(own.grad, gradient) for n, (own, gradient) in enumerate(pairs)})


def _compare(
    found: dict[str, float], name: str, ours: Callable[[Any], Any], theirs: Callable[[Any], Any], x: Any
) -> None:
    import torch

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [of(given) for of, given in zip((ours, theirs), inputs, strict=True)]
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    found[name] = _away(outputs[0], outputs[1])
    found[f"{name} input"] = _away(inputs[0].grad, inputs[1].grad)


def _away(ours: Any, theirs: Any) -> float:
    assert theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _by_head(key: Any, value: Any, heads: int) -> Any:
    import torch

    return torch.cat((key.unflatten(0, (heads, -1)), value.unflatten(0, (heads, -1))), dim=1).flatten(0, 1)


def _take_resampler(ours: Any, theirs: Any) -> None:
    import torch

    with torch.no_grad():
        theirs.latents.copy_(ours.latents)
        for own, (attention, mlp) in zip(ours.layers, theirs.blocks, strict=True):
            key, value = own.linear_kv.weight.chunk(2)
            for to, source in (
                (attention.q_proj, own.linear_q.weight), (attention.k_proj, key), (attention.v_proj, value),
                (attention.output_proj, own.linear_proj.weight), (mlp.fc, own.linear_fc1.weight),
                (mlp.c_proj, own.linear_fc2.weight),
            ):  # fmt: skip
                to.weight.copy_(source)


def _take_block(block: Any, gated: Any, heads: int) -> None:
    import torch

    with torch.no_grad():
        block.attention_gate.fill_(0.7)
        block.mlp_gate.fill_(-0.4)
        gated.alpha_cross_attn.fill_(0.7)
        gated.alpha_dense.fill_(-0.4)
        key, value = (x.flatten(0, 1) for x in block.linear_kv.weight.unflatten(0, (heads, -1)).chunk(2, dim=1))
        gate, up = block.linear_fc1.weight.chunk(2)
        for to, source in (
            (gated.cross_attn.q_proj, block.linear_q.weight), (gated.cross_attn.k_proj, key),
            (gated.cross_attn.v_proj, value), (gated.cross_attn.o_proj, block.linear_proj.weight),
            (gated.mlp.gate_proj, gate), (gated.mlp.up_proj, up), (gated.mlp.down_proj, block.linear_fc2.weight),
        ):  # fmt: skip
            to.weight.copy_(source)


@cache
def compared() -> dict[str, float]:
    (found,) = run_ranks(1, _compared)
    return found


@pytest.mark.parametrize("part", ["resampler", "gated", "latents"])
def test_values_and_gradients_equal_idefics(part: str) -> None:
    found = {name: away for name, away in compared().items() if part in name}
    assert found and {name: away for name, away in found.items() if away > TOLERANCE} == {}
