"""Auxiliary losses: their values, Megatron's agreement, and how they reach the router."""

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from gpt4moe.moe.losses import AttachLoss, load_balancing_loss, z_loss_terms
from gpt4moe.moe.statistics import column
from gpt4moe.moe.swiglu import WeightedSwiGlu
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

T, E, K = 32, 4, 2


def test_load_balancing_loss_is_one_when_every_expert_gets_the_same() -> None:
    loss = load_balancing_loss(torch.full((1, E), T / E), torch.full((1, E), T * K // E), T)
    assert loss.item() == pytest.approx(1.0, rel=1e-6)


def test_load_balancing_loss_is_the_number_of_experts_when_one_gets_all() -> None:
    only = torch.tensor([[float(T), 0, 0, 0]])
    assert load_balancing_loss(only, only, T).item() == pytest.approx(E)


def test_load_balancing_loss_pushes_probability_away_from_the_crowded_expert() -> None:
    probability_sum = torch.full((1, E), T / E, requires_grad=True)
    load_balancing_loss(probability_sum, torch.tensor([[20, 4, 4, 4]]), T).backward()
    assert probability_sum.grad is not None and probability_sum.grad.argmax() == 0


def test_z_loss_is_zero_for_normalised_logits_and_grows_with_their_scale() -> None:
    normalised = torch.randn(T, E).log_softmax(dim=-1)
    assert z_loss_terms(normalised).sum().item() == pytest.approx(0, abs=1e-10)
    assert z_loss_terms(torch.full((T, E), 3.0)).sum().item() == pytest.approx(T * (3 + log(E)) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: load_balancing_loss(x, torch.ones(T, E), T),
        z_loss_terms,
        lambda x: WeightedSwiGlu.apply(x, torch.ones(T, 1)),
    ],
    ids=["balance", "z-loss", "swiglu"],
)
def test_a_gradient_by_hand_is_not_differentiated_once_more(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(T, E, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_attached_loss_gets_its_scale_and_leaves_the_output_alone() -> None:
    output, loss = torch.randn(5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    attached = AttachLoss.apply(output, loss * 3, 0.25)
    assert torch.equal(attached, output)
    attached.sum().backward()
    assert torch.equal(output.grad, torch.ones(5)) and loss.grad.item() == 0.75


def test_both_losses_equal_megatrons_in_value_and_gradient() -> None:
    (differences,) = run_ranks(1, _against_megatron)
    assert max(differences.values()) < 1e-6, differences  # fp32, sums in another order


def _against_megatron(environment: Environment) -> dict[str, float]:
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func

    from tests.moe.case import relative

    start = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    found = []
    for ours in (True, False):
        logits = start.clone().requires_grad_()
        probability = logits.softmax(dim=-1)
        load = torch.bincount(probability.topk(K).indices.flatten(), minlength=E)
        if ours:
            balance = 0.1 * load_balancing_loss(probability.sum(dim=0, keepdim=True), load.unsqueeze(0), T)
            z_loss = 0.01 * z_loss_terms(logits).mean()
        else:
            balance = switch_load_balancing_loss_func(probability, load, T, K, E, 0.1)
            z_loss = z_loss_func(logits, 0.01)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (balance, z_loss)]
        found.append([balance.detach(), z_loss.detach(), *gradients])
    names = ("balance", "z-loss", "gradient of balance", "gradient of z-loss")
    return {name: relative(a, b) for name, a, b in zip(names, *found, strict=True)}


def test_a_pool_of_two_ranks_has_the_losses_of_the_whole_and_each_rank_its_own_gradient() -> None:
    (whole,) = run_ranks(1, _pooled)
    halves = run_ranks(2, _pooled)
    assert all(ended["wants gradients"] == [True, False] for ended in (whole, *halves))
    for half in halves:
        assert half["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    gradient = torch.tensor(halves[0]["gradient"]) + torch.tensor(halves[1]["gradient"])
    torch.testing.assert_close(gradient, torch.tensor(whole["gradient"]), rtol=1e-5, atol=1e-7)


def _pooled(environment: Environment) -> dict[str, list]:
    """A layer whose output is ignored: what its router gets comes from the auxiliary losses alone."""
    from tests.moe.case import build_layer, moe_config, rank_groups, tokens

    with rank_groups(environment, tp=environment.world_size) as groups:
        layer = build_layer(groups, moe_config(E, K, load_balancing_coefficient=0.3, z_loss_coefficient=0.02))
        layer.auxiliary_scale = 1.0
        hidden, _ = tokens(8, 2)
        mine = hidden.detach().chunk(environment.world_size)[environment.rank]
        output, _ = layer(mine)
        (output * 0).sum().backward()
        losses = [column(layer.statistics.read(groups.device), name) for name in ("load_balancing_loss", "z_loss")]
        whole = torch.stack(losses) * environment.world_size  # a rank has its share, 1 / ranks
        sums = layer.pool.sum(torch.ones(2, 3, requires_grad=True), torch.ones(2))
        wanting = [value.requires_grad for value in sums]
        return {
            "losses": whole.tolist(), "gradient": layer.router.weight.grad.tolist(), "wants gradients": wanting
        }  # fmt: skip


def test_per_sequence_and_global_losses_are_the_papers_sums_token_by_token() -> None:
    (found,) = run_ranks(1, _scopes)
    for scope, (loss, reference) in found.items():
        assert loss == pytest.approx(reference, rel=1e-6), scope
    assert len({round(reference, 5) for _, reference in found.values()}) == 3, "the scopes must be seen apart"


def _scopes(environment: Environment) -> dict[str, tuple[float, float]]:
    """Scope -> the layer's loss, and a plain reference that walks over tokens."""
    from gpt4moe.config.moe import LoadBalancingScope
    from tests.moe.case import build_layer, moe_config, rank_groups, tokens

    load = torch.tensor(
        [30.0, 5.0, 10.0, 18.0], dtype=torch.float64
    )  # of the step before; 63: no share is exact in bf16
    found = {}
    with rank_groups(environment) as groups:
        for scope in LoadBalancingScope:
            layer = build_layer(groups, moe_config(E, K, load_balancing_coefficient=1.0, load_balancing_scope=scope))
            layer.router.finish_step(load)
            hidden, _ = tokens(8, 3)
            layer(hidden)
            logits = (hidden.detach().double() @ layer.router.weight.detach().double().t()).transpose(0, 1)  # [B, S, E]
            sequences = [*logits] if scope is LoadBalancingScope.sequence else [logits.reshape(-1, E)]
            share = load / load.sum() if scope is LoadBalancingScope.global_batch else None
            reference = sum(_reference(sequence, share) for sequence in sequences) / len(sequences)
            found[scope.value] = (column(layer.statistics.read(groups.device), "load_balancing_loss").item(), reference)
    return found


def _reference(logits: torch.Tensor, share: torch.Tensor | None) -> float:
    """DeepSeek-V3's equations 17-20 for one sequence [T, E]: sum_e f_e P_e, with f_e = E / (K T) * tokens that chose e
    (`share`: E * share_e instead)."""
    fraction, probability = [0.0] * E, [0.0] * E
    for row in logits:
        chances = row.softmax(dim=0).tolist()
        for expert in sorted(range(E), key=lambda e: -chances[e])[:K]:
            fraction[expert] += E / (K * len(logits))
        probability = [total + chance / len(logits) for total, chance in zip(probability, chances, strict=True)]
    if share is not None:
        fraction = (E * share).tolist()
    return sum(f * p for f, p in zip(fraction, probability, strict=True))
