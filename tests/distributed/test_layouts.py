"""The point of the project: on every layout the same gradients, norm and weights as one process, from equal weights.

One file, so that one process runs them all and each layout's ranks start once (runs.py).
"""

import numpy as np
import pytest

from tests.distributed.layouts import LAYOUTS
from tests.distributed.runs import bf16_differences, one_process, runs
from tests.distributed.test_gradients import assert_same, distance

pytestmark = pytest.mark.layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_norms_and_clipped_sgd_equal_one_process(name: str) -> None:
    want = one_process(LAYOUTS[name])["descent"]
    assert all(norm > 0.5 for norm in want.norms), "every step must be clipped for this test to see the norm"
    assert_same(runs(LAYOUTS[name])["descent"], want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_ramp_of_batch_and_length_equals_one_process_in_every_step(name: str) -> None:
    assert_same(runs(LAYOUTS[name])["ramped"], one_process(LAYOUTS[name])["ramped"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients_of_documents_equal_one_process(name: str) -> None:
    want = one_process(LAYOUTS[name])
    assert_same(runs(LAYOUTS[name])["documents"], want["documents"])
    assert abs(want["documents"].losses[0] - want["descent"].losses[0]) > 1e-3, "a mask must matter here"


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_adamw_steps_follow_one_process(name: str) -> None:
    got, want = runs(LAYOUTS[name])["adamw"], one_process(LAYOUTS[name])["adamw"]
    np.testing.assert_allclose(got.losses, want.losses, atol=1e-4, equal_nan=False)
    np.testing.assert_allclose(got.norms, want.norms, rtol=1e-3, equal_nan=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_after_adamw_steps_equal_one_process(name: str) -> None:
    got, want = runs(LAYOUTS[name])["three"], one_process(LAYOUTS[name])["three"]
    for parameter, value in want.weights.items():
        # Adam divides by the gradient's own size: where that is near zero, round-off is a whole step of lr (0.003).
        assert distance(got.weights[parameter], value) <= 1e-4, parameter


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_steps_are_as_near_to_fp32_as_one_process_is_and_follow_from_their_gradients(name: str) -> None:
    assert bf16_differences(LAYOUTS[name], runs(LAYOUTS[name])["rounded"]) == []
