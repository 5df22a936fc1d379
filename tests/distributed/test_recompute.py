"""What is computed again in the backward pass comes out the same, is counted once, and is not kept."""

from functools import cache

import numpy as np
import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from tests.distributed.case import BASE, Outcome, descents, synthetic_batches
from tests.distributed.layouts import LAYOUTS
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

PARTIAL = "full, first layer of a stage"
KINDS = {
    "selective": ("parallel.recompute=selective",),
    "moe": ("parallel.recompute=moe",),
    "full": ("parallel.recompute=full",),
    PARTIAL: ("parallel.recompute=full", "parallel.recompute_layers=1"),
}
WITH_DOCUMENTS = ("selective", "full", PARTIAL)
# Drops, both auxiliary losses and noise on: each is decided once, or decided again and equal.
DROPS = ("model.moe.router.capacity_factor=0.8", "model.moe.router.input_jitter=0.1")


@cache
def ran(layout: str) -> dict[str, Outcome]:
    """Every kind, and without."""
    case = LAYOUTS[layout]
    kinds = {kind: (*case.overrides, *DROPS, *recompute) for kind, recompute in {**KINDS, "none": ()}.items()}
    kinds |= {f"{kind}, documents": (*kinds[kind], "data.document_mask=true") for kind in (*WITH_DOCUMENTS, "none")}
    return descents(case.world_size, kinds, steps=2, rate=0.05)


SHOWN = [*((kind, "tp2-pp2-ep2") for kind in KINDS), ("selective", "cp2")]


@pytest.mark.parametrize(
    ("kind", "layout", "documents"),
    [
        *((kind, layout, "") for kind, layout in SHOWN),
        *((kind, layout, ", documents") for kind, layout in SHOWN if kind in WITH_DOCUMENTS),
    ],
)
def test_recompute_changes_no_bit_of_losses_gradients_weights_and_counts(
    kind: str, layout: str, documents: str
) -> None:
    got, want = ran(layout)[kind + documents], ran(layout)[f"none{documents}"]
    assert got.losses == want.losses and got.norms == want.norms
    for ours, kept in ((got.gradients, want.gradients), (got.weights, want.weights)):
        for name, value in kept.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
    np.testing.assert_array_equal(got.routing, want.routing)
    assert want.routing[0][:, 4].min() > 0, "every layer must drop something"


def test_recompute_keeps_fewer_activations() -> None:
    kept = run_ranks(2, _kept_bytes)[0]
    # Attention over cp gathers keys and values of the whole sequence: what selective recompute does not keep.
    assert kept["selective"] < 0.96 * kept["none"]
    # 4 layers of 128 tokens with 2 experts each: rows [256, 32] and gate and up [256, 48], fp32.
    assert kept["none"] - kept["moe"] >= 4 * 256 * (32 + 48) * 4
    assert kept[PARTIAL] < 0.8 * kept["none"]
    assert kept["full"] < 0.25 * kept["none"]


def _kept_bytes(environment: Environment) -> dict[str, int]:
    """Bytes of activations that one forward pass keeps, for each of KINDS and for none."""
    kept = {}
    with world(environment) as device:
        for kind, recompute in {**KINDS, "none": ()}.items():
            run = load_run_config([*BASE, "parallel.cp=2", "model.seq_length=128", *recompute])
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            kept[kind] = _kept(run, groups)
    return kept


def _kept(run: RunConfig, groups: ProcessGroups) -> int:
    (chunk,) = build_model(run, groups)
    batch = synthetic_batches(run, 1, 1, 0)[0].context_slice(2, groups.coordinate["cp"])
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels)
    assert loss.requires_grad
    return sum(seen.values())
