"""The loss on held-out text: of the model alone, and the same number on every layout."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.training.command import metrics, train

pytestmark = pytest.mark.layouts

# One update that changes nothing; five samples are no multiple of any layout's micro-batches: some are filled up
# with padding, which drops and both losses would feel.
ASKED = (
    "training.steps=1", "training.eval_samples=5", "optimizer.lr=1e-30", "model.moe.router.capacity_factor=0.8",
    "training.micro_batch_size=2", "model.num_layers=4",
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "pp2-vpp2": (2, ("parallel.pp=2", "parallel.vpp=2")),
    "tp2-pp2-ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "cp2-etp2": (2, ("parallel.cp=2", "parallel.etp=2")),
    "dp2-deepspeed": (2, ("engine=deepspeed", "parallel.ep=2")),
}


@cache
def losses(ranks: int, *overrides: str) -> tuple[float, float]:
    """(training loss, loss on held-out text) of the first step."""
    with TemporaryDirectory() as folder:
        for ended in train(Path(folder) / "x", *ASKED, *overrides, ranks=ranks):
            assert ended.status == 0, ended.err
        (record,) = metrics(Path(folder) / "x")
    return record["loss"], record["eval_loss"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_on_a_layout_what_it_is_in_one_process(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    got, want = losses(ranks, *overrides), losses(1)
    assert got == pytest.approx(want, rel=1e-6), "fp32 sums in another order"


def test_noise_is_for_training_alone() -> None:
    noisy, plain = losses(1, "model.moe.router.input_jitter=0.3"), losses(1)
    assert noisy[0] != plain[0] and noisy[1] == plain[1]
