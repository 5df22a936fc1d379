"""shrink: makes any run small enough for a laptop to train in seconds, and keeps its kind. No torch.

Kept: the mesh (up to 12 ranks), which layers are dense or MoE, uneven and empty stages, how experts lie on ranks, the
router and its settings, losses, tied embeddings, query groups, precision, engine, recompute, everything not named
below. Smaller: widths, depth, vocabulary, sequence, batch, buckets of gradients. Larger, because a fault would hide
below round-off: initial weights, loss coefficients, the step of a router's bias. Every step of a run that clips is
clipped.
"""

from dataclasses import dataclass
from itertools import chain
from math import ceil, gcd, lcm
from typing import Any

from gpt4moe.config.load import config_from_dict, config_to_dict
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.parallel.kernel_problems import DeviceKind
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.proof.mesh import asked_layout, copies_beside, reduced
from gpt4moe.proof.plan import CLIP_NORM, require_replayable

_WIDTH, _HEAD, _FFN, _VOCAB, _SEQ = 32, 8, 24, 64, 16
_FIXED = {  # group -> what every proof has
    "run": {"name": "proof"},
    "data": {"kind": "mock", "path": None, "tokenizer": None, "sources": {}},
    "schedule": {"kind": "constant", "total_steps": 100, "warmup_steps": 0},
    "checkpoint": {"load": None},
    "kernels": {  # those that a CPU has
        "attention": "sdpa",
        "norm": "torch",
        "experts": "auto",
        "swiglu": "auto",
        "rotary": "auto",
        "cross_entropy": "auto",
        "router": "auto",
    },
    "optimizer": {"lr": 0.003},
    "model": {"init_std": 0.2},
}
_BUCKET = 5000
"""Elements: several buckets in a rank's gradients, as a large model has."""
# Settings that are not 0 are at least this: gradients then feel the losses, and the bias turns choices within 3 steps.
_SMALLEST = {"load_balancing_coefficient": 0.1, "z_loss_coefficient": 0.01, "bias_update_rate": 0.02}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """The small run that is proved in place of the asked one."""

    asked: RunConfig
    asked_layout: Layout
    run: RunConfig
    layout: Layout

    @property
    def oracle(self) -> RunConfig:
        """The run of one process to compare with: the same model and batch, the default engine, no recompute, and
        gradients of weights that autograd makes."""
        raw = config_to_dict(self.run)
        raw["kernels"]["weight_gradients"] = "torch"
        raw["parallel"] = config_to_dict(RunConfig())["parallel"]
        raw["engine"] = config_to_dict(RunConfig())["engine"]
        return config_from_dict(raw)


def shrink(run: RunConfig, ranks: int | None = None) -> list[Shrunk]:
    """One small run for each mesh (proof.mesh). When `ranks` is None and experts have no copies on any mesh, one more
    mesh has copies.

    Raises: LayoutError when the trainer would refuse the run itself; ConfigError for an optimizer that no proof knows.
    """
    require_replayable(run)
    asked = asked_layout(run, ranks)
    meshes = reduced(asked)
    if run.model.moe is not None and ranks is None and all(mesh.expert_dp == 1 for mesh in meshes):
        meshes += copies_beside(asked)
    return [_shrunk(run, asked, proved) for proved in meshes]


def _shrunk(run: RunConfig, asked: Layout, proved: Layout) -> Shrunk:
    depth = shrunk_depth(run, proved.pp * proved.vpp)
    raw = config_to_dict(run)
    for group, values in _FIXED.items():
        raw[group].update(values)
    if run.kernels.weight_gradients.is_fused(on_gpu=DeviceKind.of_cluster(run.cluster).is_gpu, engine=run.engine.kind):
        raw["kernels"]["weight_gradients"] = "fused"  # CPUs have it too
    raw["parallel"].update(_parallel(proved, depth))
    raw["model"].update(_model(run, proved, depth))
    raw["training"].update(_batch(run, proved))
    if run.engine.overlap_grad_reduce:  # only then does Megatron's engine cut its gradients into buckets
        raw["engine"]["bucket_size"] = _BUCKET
    if run.optimizer.clip_norm:
        raw["optimizer"]["clip_norm"] = CLIP_NORM
    return Shrunk(asked=run, asked_layout=asked, run=_with_experts(raw, run, proved, depth), layout=proved)


def _parallel(proved: Layout, depth: "Depth") -> dict[str, Any]:
    degrees = {name: getattr(proved, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    # The list of layers says where the embedding and the head counted too.
    counts = {"embedding_counts_as_layer": False, "head_counts_as_layer": False}
    stages = {"layers_per_stage": depth.layers_per_stage, "recompute_layers": depth.recompute_layers}
    return degrees | counts | stages


def _model(run: RunConfig, proved: Layout, depth: "Depth") -> dict[str, Any]:
    """Sizes that every cut divides; keys and values stay shared, heads of their own width stay so."""
    model, tp = run.model, proved.tp
    groups = 1 if model.query_groups == 1 else tp * ceil(2 / tp)
    heads = groups * min(2, model.num_attention_heads // model.query_groups)
    heads *= tp // gcd(heads, tp)
    head = max(_HEAD // 2, 2 * ceil(_WIDTH / heads / 2))
    sizes: dict[str, Any] = {
        "num_layers": depth.num_layers,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "hidden_size": heads * head,
        "vocab_size": tp * ceil(_VOCAB / tp),
        "seq_length": _rounded(_SEQ, 2 * proved.cp * tp),
    }
    if model.head_dim is not None:
        sizes["head_dim"] = head + 2  # heads together wider than the hidden size
    if model.ffn_hidden_size:
        sizes["ffn_hidden_size"] = 2 * _rounded(_FFN, lcm(tp, 2))
    if model.vision is not None:
        every = max(1, round(model.vision.cross_attention_every * depth.num_layers / model.num_layers))
        sizes["vision"] = {
            "encoder": {"kind": "fresh", "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_layers": 1,
                        "num_attention_heads": 2, "ffn_hidden_size": 16},
            "resampler": {"num_layers": min(2, model.vision.resampler.num_layers), "num_latents": 4,
                          "num_attention_heads": 2, "max_frames": min(2, model.vision.resampler.max_frames)},
            "cross_attention_every": every,
            "ffn_hidden_size": 2 * _rounded(_FFN, lcm(tp, 2)),
        }  # fmt: skip
    return sizes


def _rounded(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `size`."""
    return unit * ceil(size / unit)


def _batch(run: RunConfig, proved: Layout) -> dict[str, Any]:
    """More micro-batches than stages, so that every pipeline reaches its steady state; at least three a rank."""
    count = _rounded(proved.pp + 1, proved.pp) if proved.vpp > 1 else max(3, proved.pp + 1)
    micro = min(2, run.training.micro_batch_size)
    sizes = {"micro_batch_size": micro, "global_batch_size": micro * count * proved.dp}
    return sizes | {"batch_ramp": [], "length_ramp": []}


def _with_experts(raw: dict[str, Any], run: RunConfig, proved: Layout, depth: "Depth") -> RunConfig:
    """The run with as few experts as the router's own checks and the layout allow; at least as many a rank as two, or
    as the asked run has."""
    moe = run.model.moe
    if moe is None:
        return config_from_dict(raw)
    small = raw["model"]["moe"]
    small |= {"ffn_hidden_size": _rounded(_FFN, 2 * proved.etp), "layer_pattern": depth.layer_pattern}
    small |= {"layer_frequency": 1, "dense_first_layers": 0}
    if moe.shared_expert_ffn_hidden_size is not None:
        small["shared_expert_ffn_hidden_size"] = 2 * _rounded(_FFN, lcm(proved.tp, 2))
    for name, smallest in _SMALLEST.items():
        if small["router"].get(name):
            small["router"][name] = max(smallest, small["router"][name])
    problem: ConfigError | LayoutError | None = None
    at_least = min(moe.num_experts, max(4, moe.top_k + 1))
    for count in range(proved.ep, max(moe.num_experts, proved.ep) + 1, proved.ep):
        if count < at_least or count // proved.ep < min(2, moe.num_experts // run.parallel.ep):
            continue
        small["num_experts"] = count
        try:
            shrunk = config_from_dict(raw)
            require_legal(shrunk.model, shrunk.parallel, shrunk.training, proved.world_size)
            return shrunk
        except (ConfigError, LayoutError) as error:
            problem = error
    assert problem is not None
    raise problem


def changes(shrunk: Shrunk) -> list[tuple[str, str, str]]:
    """(key, asked, proved) of every value that is not the same, mesh and run folder aside."""
    before, after = _leaves(config_to_dict(shrunk.asked)), _leaves(config_to_dict(shrunk.run))
    degrees = {f"parallel.{name}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    unused = ("run.", "data.", "checkpoint.", "schedule.", "tracking.", "kernels.weight_gradients")
    return [
        (key, str(before.get(key)), str(value))
        for key, value in after.items()
        if before.get(key) != value and key not in degrees and not key.startswith(unused)
    ]


def _leaves(raw: dict[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{path}{key}.")
        else:
            leaves[path + key] = value
    return leaves


_DEEPEST_STAGE = 3


@dataclass(frozen=True, slots=True)
class Depth:
    """Layers of the shrunken model."""

    num_layers: int
    layer_pattern: list[int] | None
    layers_per_stage: list[int] | None
    recompute_layers: int | None


def shrunk_depth(run: RunConfig, num_stages: int) -> Depth:
    """The depth of `run` for `num_stages` (pp x vpp of the mesh to prove): a layer a stage where all are alike, one
    more where a part of them is recomputed."""
    is_moe = run.model.moe_layers
    kinds = [[int(is_moe[layer]) for layer in stage] for stage in stage_layers(run.model.num_layers, run.parallel)]
    cut = run.parallel.recompute_layers if recomputes_in_part(run) else None
    heads, tails = [stage[:cut] for stage in kinds], [stage[len(stage[:cut]) :] for stage in kinds]
    if num_stages == 1:
        heads, tails = [list(chain(*heads))], [list(chain(*tails))]
    at = _spread(len(heads), num_stages)
    heads, tails = [heads[stage] for stage in at], [tails[stage] for stage in at]
    recompute_layers = None if cut is None else max(len(set(head)) for head in heads)
    stages = _shallow(heads) if recompute_layers is None else _in_two_parts(heads, tails, recompute_layers)
    pattern = [kind for stage in stages for kind in stage]
    lengths = [len(stage) for stage in stages]
    return Depth(
        num_layers=len(pattern),
        layer_pattern=None if run.model.moe is None or all(pattern) else pattern,
        layers_per_stage=None if len(set(lengths)) == 1 else lengths,
        recompute_layers=recompute_layers,
    )


def recomputes_in_part(run: RunConfig) -> bool:
    """Whether a stage has layers that are recomputed and layers that are kept."""
    cut = run.parallel.recompute_layers
    return cut is not None and any(len(stage) > cut for stage in stage_layers(run.model.num_layers, run.parallel))


def _shallow(kinds: list[list[int]]) -> list[list[int]]:
    sizes = sorted({len(stage) for stage in kinds if stage})
    wanted = [min(1 + sizes.index(len(stage)), _DEEPEST_STAGE) if stage else 0 for stage in kinds]
    wanted = [max(size, len(set(stage))) for size, stage in zip(wanted, kinds, strict=True)]
    if len(kinds) == 1:
        wanted = [max(2, wanted[0])]
    if len(sizes) == 1 and all(kinds):  # even stages stay even
        wanted = [max(wanted)] * len(kinds)
    return [_fewer(stage, size) for stage, size in zip(kinds, wanted, strict=True)]


def _in_two_parts(heads: list[list[int]], tails: list[list[int]], size: int) -> list[list[int]]:
    """`size` recomputed layers on every stage that keeps others, then these; as many at most where none is kept."""
    return [
        _fewer(head, size if kept else len(set(head))) + kept for head, kept in zip(heads, _shallow(tails), strict=True)
    ]


def _spread(count: int, num: int) -> list[int]:
    """`num` indices of `count`, first and last among them, as evenly as it goes."""
    if num == 1:
        return [0]
    return [round(at * (count - 1) / (num - 1)) for at in range(num)]


def _fewer(kinds: list[int], size: int) -> list[int]:
    """`size` layers of a stage; of both kinds where it has both."""
    if not kinds or size == 0:
        return []
    chosen = [kinds[at] for at in _spread(len(kinds), size)]
    missing = set(kinds) - set(chosen)
    if missing:
        chosen[-1] = missing.pop()
    return chosen
