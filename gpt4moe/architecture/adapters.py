"""Adapters (LoRA) as rows of the table: two matrices for each matrix that may have one. No torch.

    W [..., out, in]  ->  A [..., rank, in], cut as W's input;  B [..., out, rank], cut as W's output, zero at first

    attention, dense MLP   W [out, in], [2, F, H]             A [r, in]        B [out, r], [2, F, r]
    experts                W [E, 2, F, H], [E, H, F]          A [E, r, in]     B [E, 2, F, r], [E, H, r]

A matrix's gate and up share one A. Rows follow the row of their matrix.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase

from gpt4moe.architecture import names
from gpt4moe.architecture.rows import Cut, Initial, Shape, TensorRow
from gpt4moe.config.model import ModelConfig

ADAPTABLE = (
    names.QKV, names.ATTENTION_OUT, names.DENSE_GATE_UP, names.DENSE_DOWN, names.EXPERTS_GATE_UP, names.EXPERTS_DOWN,
    names.SHARED_GATE_UP, names.SHARED_DOWN,
)  # fmt: skip
"""Matrices that may have an adapter."""

CUTS: dict[Cut, tuple[Cut, Cut]] = {
    Cut.rows: (Cut.whole, Cut.rows),
    Cut.gated_rows: (Cut.whole, Cut.gated_rows),
    Cut.columns: (Cut.columns, Cut.whole),
    Cut.experts_gated: (Cut.experts_whole, Cut.experts_gated),
    Cut.experts: (Cut.experts, Cut.experts_whole),
}
"""Cut of a matrix -> cuts of its A and B."""


def adapter_rows(row: TensorRow) -> tuple[TensorRow, TensorRow]:
    """The rows of a matrix's A and B."""
    is_expert = row.cut in (Cut.experts, Cut.experts_gated)

    def made(name: str, shape: Callable[[Shape, int], Shape], cut: Cut, initial: Initial) -> TensorRow:
        # No matrix to the planner: operations of a rank of 16 are a thousandth of the matrix's own.
        return TensorRow(
            name=name, family=row.family, shape=lambda m: shape(row.shape(m), _rank(m)), cut=cut, initial=initial,
            present=row.present, is_matrix=False,
        )  # fmt: skip

    a, b = names.adapter_names(row.name)
    cut_a, cut_b = CUTS[row.cut]
    return (
        made(a, lambda whole, rank: (*whole[:is_expert], rank, whole[-1]), cut_a, Initial.by_input),
        made(b, lambda whole, rank: (*whole[:-1], rank), cut_b, Initial.zeros),
    )


def is_adapted(model: ModelConfig, name: str, row: TensorRow) -> bool:
    """Whether a layer's tensor, by its logical name, has an adapter."""
    if model.lora is None or row.name not in ADAPTABLE:
        return False
    return not model.lora.targets or any(fnmatchcase(name, pattern) for pattern in model.lora.targets)


def _rank(model: ModelConfig) -> int:
    assert model.lora is not None
    return model.lora.rank
