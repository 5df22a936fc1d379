"""What a run trains: the tensors that stage.train and stage.lora leave unfrozen. No torch.

stage.train patterns, or the adapters of stage.lora  ->  names of the trained tensors  ->  engines, planner, log
"""

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from math import prod

from gpt4moe.architecture.adapters import ADAPTABLE, is_adapted
from gpt4moe.architecture.names import split_name
from gpt4moe.architecture.tensors import ModelTensor, logical_shapes, model_tensors
from gpt4moe.architecture.vision import is_vision
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import OptimizerConfig, TensorSettings
from gpt4moe.config.stage import StageConfig, StageKind
from gpt4moe.errors import ConfigError


def trained_names(model: ModelConfig, stage: StageConfig) -> frozenset[str]:
    """The logical names of the tensors that a run trains.

    Raises: ConfigError when a pattern of stage.train or stage.lora.targets matches nothing that it may.
    """
    if model.lora is not None:
        require_targets(model)
        return frozenset(adapter_shapes(model))
    shapes = logical_shapes(model)
    require_matches("stage.train", stage.train, shapes)
    return frozenset(name for name in shapes if is_trained(stage, name))


def require_images(model: ModelConfig, stage: StageConfig) -> None:
    """Raises: ConfigError when vision parts are trained by a stage that reads no images."""
    if stage.kind is StageKind.vision or model.vision is None:
        return
    names = sorted(name for name in trained_names(model, stage) if is_vision(name))
    if names:
        raise ConfigError(
            f"stage={stage.kind.value} reads no images, but stage.train={stage.train} trains {len(names)} tensors of "
            f"model.vision, {names[0]} among them.",
            "Set stage=vision, give patterns to stage.train that match no vision parts (resampler.*, "
            "*.gated_cross_attention.*), or model.vision=null: a vision checkpoint gives its text model.",
        )


def is_trained(stage: StageConfig, name: str) -> bool:
    """Whether stage.train leaves a tensor unfrozen; of a run without adapters."""
    return not stage.train or any(fnmatchcase(name, pattern) for pattern in stage.train)


def is_adapter(tensor: ModelTensor) -> bool:
    return tensor.name.endswith(("lora_a", "lora_b"))


def adapter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every adapter matrix of a model."""
    return {tensor.name: tensor.shape for tensor in model_tensors(model) if is_adapter(tensor)}


def require_targets(model: ModelConfig) -> None:
    """Checks stage.lora.targets against the matrices of a model.

    Raises: ConfigError when a pattern matches none of them, or one that cannot have an adapter.
    """
    assert model.lora is not None
    matrices = {tensor.name: tensor.row.name in ADAPTABLE for tensor in model_tensors(model) if tensor.is_matrix}
    adaptable = [name for name, may_have_one in matrices.items() if may_have_one]
    for pattern in model.lora.targets:
        for name, may_have_one in matrices.items():
            if fnmatchcase(name, pattern) and not may_have_one:
                raise ConfigError(
                    f"stage.lora.targets: {pattern} matches {name}, which cannot have an adapter.",
                    "Only matrices of attention, dense MLPs and experts have one: give a narrower pattern, over names "
                    f"such as {nearest(pattern, adaptable)}.",
                )
    require_matches("stage.lora.targets", model.lora.targets, adaptable)


def require_matches(key: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Raises: ConfigError when a pattern of the key matches no name; it names one that is close."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{key}: {pattern} matches none of the {len(names)} tensors that it may name.",
                f"Give a pattern over names such as {nearest(pattern, names)}.",
            )


def nearest(pattern: str, names: Collection[str]) -> str:
    """The name that is most like a pattern, as a whole or in the part that the pattern names."""
    wanted = pattern.strip("*.")

    def likeness(name: str) -> float:
        return max(SequenceMatcher(None, wanted, part).ratio() for part in (name, *name.split(".")))

    return max(sorted(names), key=likeness)


def tensor_settings(model: ModelConfig, stage: StageConfig, optimizer: OptimizerConfig) -> dict[str, TensorSettings]:
    """Name of a trained tensor -> its entry of optimizer.by_pattern. Tensors without one are left out.

    Raises: ConfigError when a pattern matches no trained tensor, or a tensor is in two entries.
    """
    if not optimizer.by_pattern:
        return {}
    names = sorted(trained_names(model, stage))
    found: dict[str, TensorSettings] = {}
    for settings in optimizer.by_pattern:
        require_matches("optimizer.by_pattern", [settings.tensors], names)
        for name in (name for name in names if fnmatchcase(name, settings.tensors)):
            if name in found:
                raise ConfigError(
                    f"optimizer.by_pattern: {name} is in two entries, {found[name].tensors} and {settings.tensors}.",
                    "Make one of the patterns narrower.",
                )
            found[name] = settings
    return found


def describe(model: ModelConfig, stage: StageConfig) -> str:
    """What is trained, in one line for the log: tensors, parameters, and matrices with adapters."""
    trained = trained_names(model, stage)
    shapes = logical_shapes(model)
    numbers = [sum(prod(shapes[name]) for name in names) for names in (trained, shapes)]
    line = f"trains {len(trained)} of {len(shapes)} tensors, {numbers[0]:,} of {numbers[1]:,} parameters"
    if model.lora is None:
        return line
    counts: dict[str, int] = {}
    for tensor in model_tensors(model):
        if is_adapted(model, tensor.name, tensor.row):
            experts = tensor.shape[0] if tensor.row.name.startswith("mlp.experts.") else 1
            what = split_name(tensor.name)[1].removesuffix(".weight")
            counts[what] = counts.get(what, 0) + experts
    adapted = ", ".join(f"{what} {count}" for what, count in counts.items())
    return f"{line}; adapters on {sum(counts.values())} matrices: {adapted}"
