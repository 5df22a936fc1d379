"""Bytes of one checkpoint: of all ranks together, and of the rank that writes most.

    trained weights    fp32 master and both moments, which a plan may have in 16 bits (beyond.moments)
    frozen weights     fp32 too, whatever the dtype that they are held in (checkpoint.storage)
    with adapters      the adapters alone, with their moments: frozen weights are the base's

Headers and a router's buffers are left out: kilobytes of a file.
"""

from collections.abc import Collection

from gpt4moe.architecture.tensors import model_tensors, resampler_tensors
from gpt4moe.config.model import ModelConfig
from gpt4moe.planner.step_time import stage_parameters, trained_resampler
from gpt4moe.planner.work import Work

MASTER_BYTES = 4
"""Of one trained parameter: its master weight, fp32. Two moments are beside it."""
FROZEN_BYTES = 4
"""Of one frozen parameter."""


def checkpoint_bytes(model: ModelConfig, trained: Collection[str] | None = None, *, moment_bytes: int = 4) -> float:
    """Bytes of a checkpoint of all ranks.

    Args:
        trained: names of the trained tensors; None: all.
        moment_bytes: of one element of a moment.
    """
    sizes = {tensor.name: tensor.size for tensor in model_tensors(model)}
    learned = sum(size for name, size in sizes.items() if trained is None or name in trained)
    frozen = sum(sizes.values()) - learned if model.lora is None else 0
    return float((MASTER_BYTES + 2 * moment_bytes) * learned + FROZEN_BYTES * frozen)


def saved_bytes(work: Work, world_size: int) -> float:
    """Bytes that one rank writes into a checkpoint, and copies to host memory before if saves are asynchronous; in the
    stage with the most of them. Data-parallel ranks share weights and states equally.
    """
    states = _state_bytes(work, world_size)
    if work.trained is None or work.model.lora is not None:
        return max(states)
    resampler = sum(tensor.size for tensor in resampler_tensors(work.model)) - trained_resampler(work)
    stages = zip(stage_parameters(work), stage_parameters(work, trained=work.trained), strict=True)
    frozen = [(whole[0] - part[0] + resampler, whole[1] - part[1]) for whole, part in stages]
    weights = [FROZEN_BYTES * _of_rank(work, world_size, sizes) for sizes in frozen]
    return max(map(sum, zip(states, weights, strict=True)))


def state_bytes(work: Work, world_size: int) -> float:
    """Of saved_bytes masters and moments alone: what an offloaded optimizer has in host memory."""
    return max(_state_bytes(work, world_size))


def _state_bytes(work: Work, world_size: int) -> list[float]:
    stages, resampler = stage_parameters(work, trained=work.trained), trained_resampler(work)
    return [
        (MASTER_BYTES + 2 * work.moment_bytes) * _of_rank(work, world_size, (dense + resampler, expert))
        for dense, expert in stages
    ]


def _of_rank(work: Work, world_size: int, sizes: tuple[float, float]) -> float:
    """Of (dense, expert) parameters that the ranks of a stage have copies of: one rank's part."""
    stage = world_size // work.parallel.pp
    return sizes[0] / (stage // work.parallel.tp) + sizes[1] / (stage // (work.parallel.ep * work.parallel.etp))
