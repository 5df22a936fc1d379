"""MicroBatch: one micro-batch on one rank: sizes, kernels, what is trained, images. What activations are counted from.

Letters: T tokens of a micro-batch on a rank (S * B / cp), T/tp between layers under sequence parallelism, N rows at the
experts of a rank.
"""

from dataclasses import dataclass, field
from math import ceil

from gpt4moe.architecture.names import (
    ATTENTION_OUT,
    DENSE_DOWN,
    DENSE_GATE_UP,
    EXPERTS_DOWN,
    EXPERTS_GATE_UP,
    INPUT_NORM,
    K_NORM,
    MLP_NORM,
    Q_NORM,
    QKV,
    ROUTER,
    SHARED_DOWN,
    SHARED_GATE_UP,
    adapter_names,
    layer_name,
)
from gpt4moe.architecture.trained import trained_names
from gpt4moe.architecture.vision import GATED_ROWS
from gpt4moe.config.beyond import Module
from gpt4moe.config.cluster import Generation
from gpt4moe.config.kernels import ExpertKernel, NormKernel, SwiGluKernel, expert_kernel, swiglu_kernel
from gpt4moe.config.model import LayerKind, ModelConfig
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.plan import beyond_of, images_per_sequence
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.stacks import Kernels, kernels_of, plan_stack, product_bytes

FLOAT, LONG, INT = 4, 8, 4
"""Bytes of fp32, int64 and int32."""
FREEZABLE = (
    INPUT_NORM, QKV, Q_NORM, K_NORM, ATTENTION_OUT, MLP_NORM, DENSE_GATE_UP, DENSE_DOWN, ROUTER, EXPERTS_GATE_UP,
    EXPERTS_DOWN, SHARED_DOWN, SHARED_GATE_UP, *(row.name for row in GATED_ROWS),
)  # fmt: skip
"""Tensors of a layer for whose gradient autograd keeps something that nothing else needs."""
_GROUP_ALIGNMENT = 8
"""Rows: for grouped products each local expert's are padded to a multiple of this, moe.expert_rows.ALIGNED. It is
counted for one expert and for large products too, which need no padding (moe.grouped_products)."""
Bytes = dict[str, int]
"""Tensor -> bytes that autograd keeps of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch on one rank, and the kernels that compute it."""

    model: ModelConfig
    layout: Layout
    batch: int
    """B: sequences in the micro-batch."""
    item: int
    """Bytes of one element of a weight or activation."""
    product_item: int
    """Bytes of one element of a product's input as it is kept: 1 in fp8, else `item`."""
    kernels: Kernels
    """Of the stack that is planned."""
    fused_norm: bool
    grouped: bool
    """Whether experts run as grouped products."""
    fused_swiglu: bool
    """Whether their activation is one Triton kernel each way, which makes no fp32 copies."""
    fused_rotary: bool
    """Whether one Triton kernel cuts the projection into queries, keys and values and turns them: its output is not
    kept, and no layer keeps sines. With model.qk_norm it is kept for the norms."""
    fused_loss: bool
    """Whether the loss keeps logits in the model's dtype, not probabilities in fp32."""
    fused_router: bool
    """Whether the router keeps its probabilities once."""
    imbalance: float
    """Rows at the fullest rank's experts, divided by an even share; 1.0 or more."""
    kinds: tuple[LayerKind, ...]
    """Tensors of each layer."""
    images: int = 0
    """Of the row that has most: latents of every row are padded to it. 0: a text model."""
    trained: frozenset[str] | None = None
    """Names of the trained tensors, adapters alone where there are any; None: all."""
    modules: frozenset[Module] = frozenset()
    """Computed again in layers that are not recomputed whole."""
    sums: dict[tuple[object, Recompute], int] = field(default_factory=dict, compare=False)
    """Cache of layer_bytes, so that each kind of layer is computed once."""

    @classmethod
    def of(cls, run: RunConfig, layout: Layout, imbalance: float) -> "MicroBatch":
        on_gpu, bf16 = run.cluster.generation is not Generation.cpu, run.precision.dtype is Dtype.bf16
        kernel = expert_kernel(run.kernels.experts, on_gpu=on_gpu, dtype=run.precision.dtype)
        item, of_stack, is_ours = 2 if bf16 else FLOAT, kernels_of(run), plan_stack(run) is None
        moe = run.model.moe
        return cls(
            model=run.model, layout=layout, batch=run.training.micro_batch_size, item=item,
            product_item=product_bytes(run, item), kernels=of_stack,
            modules=frozenset(beyond_of(run).recompute),
            fused_norm=on_gpu or run.kernels.norm is NormKernel.apex, grouped=kernel is ExpertKernel.grouped_mm,
            fused_swiglu=swiglu_kernel(run.kernels.swiglu, on_gpu=on_gpu, experts=kernel) is SwiGluKernel.triton,
            fused_rotary=is_ours and run.kernels.rotary.is_triton(on_gpu=on_gpu),
            fused_loss=of_stack.fused_loss or (is_ours and run.kernels.cross_entropy.is_triton(on_gpu=on_gpu)),
            fused_router=is_ours and moe is not None and moe.router.is_fusable
            and run.kernels.router.is_triton(on_gpu=on_gpu),
            imbalance=imbalance, kinds=tuple(run.model.layer_kinds), images=ceil(images_per_sequence(run)),
            trained=trained_names(run.model, run.stage) if run.stage.train or run.model.lora else None,
        )  # fmt: skip

    def trains(self, name: str) -> bool:
        return self.trained is None or name in self.trained

    def frozen(self, layer: int) -> frozenset[str]:
        """The tensors of a layer that are not trained, by their names within it; of those in FREEZABLE. A matrix with
        an adapter counts as trained: the adapter needs the same input."""
        if self.trained is None:
            return frozenset()
        needed = self.trained
        return frozenset(
            name
            for name in FREEZABLE
            if needed.isdisjoint((layer_name(layer, name), layer_name(layer, adapter_names(name)[0])))
        )

    def kind(self, layer: int) -> tuple[LayerKind, bool, frozenset[str]]:
        """What the bytes of a layer follow from."""
        return self.kinds[layer], self.model.has_gated_block(layer), self.frozen(layer)

    @property
    def sequence(self) -> int:
        """Positions of a sequence on this rank."""
        return self.model.seq_length // self.layout.cp

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def split_tokens(self) -> int:
        """Tokens that a rank holds between layers: T/tp with sequence parallelism, else T."""
        return self.tokens // self.layout.tp if self.layout.sequence_parallel else self.tokens

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one tensor [S/tp, B, H] between layers."""
        return self.split_tokens * self.model.hidden_size * self.item

    @property
    def latents(self) -> int:
        """Of all rows: keys of a gated block."""
        vision = self.model.vision
        return self.batch * self.images * vision.resampler.num_latents if vision else 0

    @property
    def expert_rows(self) -> int:
        """N of the fullest rank. At ep 1 every row stays on its rank, so imbalance has no effect."""
        moe = self.model.moe
        assert moe is not None
        even = self.split_tokens * moe.top_k * self.layout.etp
        limit = moe.router.capacity_factor or float("inf")
        rows = even if self.layout.ep == 1 and limit >= 1 else int(even * min(self.imbalance, limit))
        return rows + self.local_experts * _GROUP_ALIGNMENT if self.grouped else rows

    @property
    def local_experts(self) -> int:
        assert self.model.moe is not None
        return self.model.moe.num_experts // self.layout.ep
