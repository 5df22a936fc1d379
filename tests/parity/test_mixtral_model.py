"""Second opinion: the whole model against Hugging Face's MixtralForCausalLM on the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks


def test_the_model_equals_mixtral_in_logits_and_loss_and_gradients_also_in_documents() -> None:
    (differences,) = run_ranks(1, _against_mixtral)
    assert len(differences) == 2 * (2 + 3 + 2 * 9)  # logits, loss; embedding, norm, head; nine a layer
    # fp32 through two layers and a softmax over the vocabulary, sums in another order. A wrong angle of the rotary
    # embedding, a swapped gate and up or an epsilon would show at 1e-3 and more.
    assert max(differences.values()) < 1e-5, differences


def _against_mixtral(environment: Environment) -> dict[str, float]:
    from gpt4moe.config.load import load_run_config
    from gpt4moe.data.batch import places_in_documents
    from gpt4moe.model.documents import PackedDocuments
    from gpt4moe.model.gpt import build_model
    from tests.distributed.case import BASE
    from tests.moe.case import rank_groups, relative

    run = load_run_config([*BASE, "model.num_layers=2", "model.moe.router.load_balancing_coefficient=0"])
    with rank_groups(environment) as groups:
        (ours,) = build_model(run, groups)
        theirs = _mixtral(run.model)
        pairs = _pairs(ours, theirs, run.model)
        with torch.no_grad():
            for value, parameter, rows in pairs.values():
                parameter.copy_(value if rows is None else value[rows])
        tokens = torch.randint(0, run.model.vocab_size, (3, 17), generator=torch.Generator().manual_seed(7))
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16, [0] + [1] * 6 + [2] * 9])
        differences = {}
        for parted in (None, documents):
            packed = {} if parted is None else {"packed_seq_params": PackedDocuments.of(parted, groups.device)}
            # What tells transformers of several documents in a row.
            positions = torch.arange(16).expand(3, 16) if parted is None else places_in_documents(parted)
            ours.zero_grad()
            theirs.zero_grad()
            logits = ours(inputs, positions, None, **packed)
            loss = ours(inputs, positions, None, labels=labels, **packed).mean()
            loss.backward()
            wanted = theirs(inputs, position_ids=positions, use_cache=False).logits  # with a cache it would not look
            wanted_loss = nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten())
            wanted_loss.backward()
            found = {
                "logits": relative(logits.detach(), wanted.detach()),
                "loss": relative(loss.item(), wanted_loss.item()),
            }
            for name, (value, parameter, rows) in pairs.items():
                gradient = value.grad if rows is None else value.grad[rows]
                found[name] = relative(gradient, parameter.grad)
            differences |= found if parted is None else {f"{name}, documents": value for name, value in found.items()}
        return differences


def _mixtral(model: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.moe.ffn_hidden_size,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.query_groups, max_position_embeddings=model.seq_length,
            rms_norm_eps=model.norm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            num_local_experts=model.moe.num_experts, num_experts_per_tok=model.moe.top_k, sliding_window=None,
            attn_implementation="sdpa", experts_implementation="eager",
        )
    )  # fmt: skip


def _pairs(ours: Any, theirs: Any, model: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter, Tensor | None]]:
    """Name -> (our parameter, theirs, the rows of ours that theirs is; None: all)."""
    pairs = {
        "embedding": (ours.embedding.word_embeddings.weight, theirs.model.embed_tokens.weight, None),
        "final norm": (ours.decoder.final_layernorm.weight, theirs.model.norm.weight, None),
        "head": (ours.output_layer.weight, theirs.lm_head.weight, None),
    }
    for index, (layer, other) in enumerate(zip(ours.decoder.layers, theirs.model.layers, strict=True)):
        attention, moe = other.self_attn, other.mlp
        qkv = layer.self_attention.linear_qkv.weight
        rows = _qkv_rows(model)
        for part in ("q", "k", "v"):
            pairs[f"{index} qkv {part}"] = (qkv, getattr(attention, f"{part}_proj").weight, rows[part])
        pairs |= {
            f"{index} attention norm": (layer.input_layernorm.weight, other.input_layernorm.weight, None),
            f"{index} attention output": (layer.self_attention.linear_proj.weight, attention.o_proj.weight, None),
            f"{index} mlp norm": (layer.pre_mlp_layernorm.weight, other.post_attention_layernorm.weight, None),
            f"{index} router": (layer.mlp.router.weight, moe.gate.weight, None),
            f"{index} gate_up": (layer.mlp.experts.gate_up, moe.experts.gate_up_proj, None),
            f"{index} down": (layer.mlp.experts.down, moe.experts.down_proj, None),
        }
    return pairs


def _qkv_rows(model: Any) -> dict[str, Tensor]:
    """Our rows are, per query group, its query heads, its key, its value."""
    per_group = model.num_attention_heads // model.query_groups
    heads = torch.arange(model.query_groups * (per_group + 2) * model.head_size)
    heads = heads.view(model.query_groups, per_group + 2, model.head_size)
    return {"q": heads[:, :per_group].flatten(), "k": heads[:, per_group].flatten(), "v": heads[:, -1].flatten()}
