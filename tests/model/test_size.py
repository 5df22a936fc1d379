"""The reported sizes, counted on built models: every stage of GPT-4's layout, on the meta device, without memory."""

from math import prod

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from tests.spawn import run_ranks

# The layout of configs/parallel/tp8_pp15_ep16.yaml with dp 2, the least that ep 16 fits: sizes do not depend on dp.
WORLD_SIZE = 240


def _logical_sizes(environment: Environment, experiment: str, world_size: int) -> tuple[dict[str, int], int]:
    """Elements of every logical tensor of the model, stage by stage, and parameters found on a device."""
    import torch
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.parameters import shards
    from gpt4moe.parallel import cpu_device
    from gpt4moe.parallel.groups import ProcessGroups

    cpu_device.install()
    run = load_run_config([f"+experiment={experiment}", "run.name=size"])
    layout = Layout.from_config(run.parallel, world_size)
    sizes: dict[str, int] = {}
    materialised = 0
    for stage in range(layout.pp):
        rank = stage * layout.stage_size
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        groups = ProcessGroups.create(layout, rank, torch.device("cpu"), seed=1)
        for parameter, shard, _ in shards(build_model(run, groups, meta=True), groups):
            sizes[shard.name] = prod(shard.global_shape)
            materialised += not parameter.is_meta
        distributed.destroy_process_group()
    return sizes, materialised


@pytest.mark.parametrize(
    ("experiment", "trillions", "expert_billions"), [("gpt4", 1.833, 110.98), ("gpt4_8x220b", 1.760, 212.8)]
)
def test_gpt4_as_reported_has_the_reported_parameters(
    experiment: str, trillions: float, expert_billions: float
) -> None:
    ((sizes, materialised),) = run_ranks(1, _logical_sizes, experiment, WORLD_SIZE)
    num_experts = {"gpt4": 16, "gpt4_8x220b": 8}[experiment]
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert materialised == 0
    assert sum(sizes.values()) / 1e12 == pytest.approx(trillions, abs=5e-4)
    assert experts / num_experts / 1e9 == pytest.approx(expert_billions, abs=0.05)
    assert len({name.split(".")[2] for name in sizes if name.startswith("decoder.layers.")}) == 120
