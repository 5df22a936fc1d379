"""Work: what the time of a step follows from: model, kinds of layers, layout, cluster, images, what is trained."""

from collections.abc import Collection
from dataclasses import dataclass

from gpt4moe.architecture.flops import Gradients, passes_of, tokens_seen
from gpt4moe.architecture.tensors import ModelTensor, layer_tensors
from gpt4moe.architecture.vision import RESAMPLER
from gpt4moe.config.beyond import Module
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.model import LayerKind, ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.planner.efficiency import MEMORY_SHARE, Efficiency


@dataclass(frozen=True, slots=True)
class TimedKind:
    """A kind of layer; all layers of one kind take the same time."""

    layer_kind: LayerKind
    seen: float
    """Mean number of tokens that a token attends to."""
    tensors: tuple[ModelTensor, ...]
    gradients: tuple[Gradients, ...] = ()
    """Of each tensor; empty: both of each."""
    has_backward: bool = True
    """Whether attention has a backward pass: anything before it is trained."""
    gated: bool = False
    """Whether a gated block stands before it, whose tensors are the last ones."""

    def gradients_of(self, place: int) -> Gradients:
        return self.gradients[place] if self.gradients else Gradients()


def timed_kinds(model: ModelConfig, trained: Collection[str] | None = None) -> list[TimedKind]:
    """The kind of each layer. The result does not depend on the layout, so a search computes it once.

    Args:
        trained: names of the trained tensors; None: all. Gradients that Megatron makes though nobody needs them, as of
            the input of a stage above the first, are not counted.
    """
    passes = None if trained is None else passes_of(model, trained)
    kinds: dict[tuple[object, ...], TimedKind] = {}
    of_layers = []
    for layer, kind in enumerate(model.layer_kinds):
        tensors, gated = tuple(layer_tensors(model, layer)), model.has_gated_block(layer)
        gradients = () if passes is None else tuple(passes.of_tensor[tensor.name] for tensor in tensors)
        has_backward = passes is None or layer not in passes.forward_attention
        key = (kind, tokens_seen(model, layer), gated, gradients, has_backward)
        if key not in kinds:
            kinds[key] = TimedKind(kind, tokens_seen(model, layer), tensors, gradients, has_backward, gated)
        of_layers.append(kinds[key])
    return of_layers


def busiest_rows(model: ModelConfig, imbalance: float, ep: int) -> float:
    """Rows at the busiest rank's experts over the mean of what is routed: what a capacity drops is not computed.

    As MicroBatch.expert_rows counts their memory. At ep 1 every row stays on its rank.
    """
    limit = (model.moe.router.capacity_factor if model.moe else None) or float("inf")
    return min(imbalance if ep > 1 else 1.0, limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Input of the time formulas: model, layout, micro-batch and cluster."""

    model: ModelConfig
    kinds: list[TimedKind]
    """The result of timed_kinds(model)."""
    parallel: ParallelConfig
    micro_batch_size: int
    cluster: ClusterConfig
    efficiency: Efficiency
    matrix_peak: float
    """Dense FLOP/s of the matrix units in the products' precision."""
    imbalance: float = 1.0
    """Token copies that the busiest expert-parallel rank computes, divided by the mean of what is routed to the ranks
    (busiest_rows); 1.0 or more without a capacity."""
    value_bytes: int = 2
    """Bytes of one element of an activation."""
    images: float = 0.0
    """Of a sequence; 0: a text model."""
    trained: frozenset[str] | None = None
    """Names of the trained tensors; None: all."""
    modules: frozenset[Module] = frozenset()
    """Computed again in layers that are not recomputed whole."""
    gradient_bytes: int = 4
    """Of one gradient as it is kept."""
    moment_bytes: int = 4
    """Of one element of a moment."""
    offloads: bool = False
    """Whether masters and moments are in host memory, and the update runs there (engine.offload_optimizer)."""

    @property
    def latents(self) -> float:
        """Of the images of a micro-batch; whole on every rank."""
        vision = self.model.vision
        return self.micro_batch_size * self.images * vision.resampler.num_latents if vision else 0.0

    @property
    def tokens(self) -> float:
        """T: tokens of a micro-batch on one context-parallel rank."""
        return self.model.seq_length * self.micro_batch_size / self.parallel.cp

    @property
    def rank_tokens(self) -> float:
        """Tokens that one tensor-parallel rank holds between layers; its router routes the same tokens."""
        return self.tokens / self.parallel.tp if self.parallel.sequence_parallel_on else self.tokens

    @property
    def copies(self) -> float:
        """Rows (token copies) of the busiest rank: its tokens times top-k times imbalance."""
        return self.rank_tokens * (self.model.moe.top_k if self.model.moe else 0) * self.imbalance

    @property
    def memory_rate(self) -> float:
        return self.cluster.memory_bytes_per_second * MEMORY_SHARE

    @property
    def trains_resampler(self) -> bool:
        return self.trained is None or any(name.startswith(RESAMPLER) for name in self.trained)

    @property
    def is_fp8(self) -> bool:
        return self.matrix_peak > self.cluster.peak_flops_bf16
