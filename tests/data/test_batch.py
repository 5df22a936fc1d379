"""Further tensors of a batch move and are cut over context parallelism by their own rule."""

import torch

from gpt4moe.data.batch import Batch, ExtraTensor


def test_a_context_rank_gets_its_part_of_every_tensor_that_names_a_sequence_dimension() -> None:
    numbers = torch.arange(8).expand(2, 8)
    pixels = torch.rand(2, 8, 3)
    batch = Batch(
        tokens=numbers, labels=numbers + 1, position_ids=numbers, loss_mask=torch.ones(2, 8),
        source_index=torch.tensor([0, 1]),
        extra={
            "noise": ExtraTensor(numbers.t(), sequence_dim=0),
            "pixels": ExtraTensor(pixels),
        },
    )  # fmt: skip
    part = batch.to(torch.device("cpu")).context_slice(2, 1)  # the second of two ranks: chunks 1 and 2 of four
    assert part.tokens.tolist() == [[2, 3, 4, 5]] * 2
    assert part.extra["noise"].value.tolist() == [[place] * 2 for place in (2, 3, 4, 5)]
    assert torch.equal(part.extra["pixels"].value, pixels)
    assert part.source_index is not None and part.source_index.tolist() == [0, 1]
    assert part.token_ids is None
    assert batch.context_slice(1, 0) is batch
