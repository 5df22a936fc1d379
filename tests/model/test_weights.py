"""load_weights: any checkpoint onto any chunks and groups, without an engine; refused together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.architecture.tensors import logical_buffers, logical_shapes
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.config.load import load_run_config
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.model.weights import load_weights
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from tests.checkpoint.builders import dealt, flip_bit, write_checkpoint
from tests.distributed.case import BASE
from tests.spawn import run_ranks

MODEL = ("router@model.moe.router=sigmoid_bias",)
TP2_PP2_VPP2 = ("parallel.tp=2", "parallel.pp=2", "parallel.vpp=2", "parallel.ep=2")


def stored(folder: Path, *overrides: str) -> dict[str, np.ndarray]:
    """Writes a checkpoint of random weights and buffers, cut at random over three files; returns them."""
    model = load_run_config([*BASE, *overrides]).model
    shapes = {f"weight/{name}": shape for name, shape in logical_shapes(model).items()}
    shapes |= {f"buffer/{name}": shape for name, shape in logical_buffers(model).items()}
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    write_checkpoint(folder, dealt(arrays, 3), block_bytes=4096, tensor_names=list(shapes))
    return arrays


def _loaded(environment: Environment, folder: Path, overrides: tuple[str, ...]) -> list[tuple[Any, ...]] | str:
    """(name, offset, values as the logical tensor's rectangle) of everything this rank holds; or why it refuses."""
    run = load_run_config([*BASE, *overrides])
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        chunks = build_model(run, groups)
        if run.precision.dtype == "bf16":
            chunks = [chunk.bfloat16() for chunk in chunks]
        try:
            load_weights(CheckpointReader(folder), chunks, groups)
        except Gpt4MoeError as error:
            return error.cause
        held = [(f"weight/{shard.name}", shard, parameter.detach()) for parameter, shard, _ in shards(chunks, groups)]
        held += [(f"buffer/{shard.name}", shard, buffer) for buffer, shard in buffers(chunks, groups)]
        return [(name, shard.offset, values.float().reshape(shard.shape).numpy()) for name, shard, values in held]


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (4, TP2_PP2_VPP2),
        (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "model.tied_embeddings=true")),
        (2, ("parallel.ep=2", "precision=bf16")),
        (1, ()),
    ],
    ids=["tp2-pp2-vpp2-ep2", "tied", "bf16", "one"],
)
def test_every_rank_gets_its_part_of_every_tensor_bitwise(
    world_size: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    arrays = stored(tmp_path / "x", *MODEL, *overrides)
    answers = run_ranks(world_size, _loaded, tmp_path / "x", (*MODEL, *overrides))
    seen = {name: np.zeros(array.shape, dtype=bool) for name, array in arrays.items()}
    for name, offset, values in (part for answer in answers for part in answer):
        where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        want = torch.from_numpy(arrays[name][where].copy())
        want = want.bfloat16().float() if "precision=bf16" in overrides and name.startswith("weight/") else want
        if "precision=bf16" in overrides and name.startswith("buffer/"):
            want = want.to(torch.float32)
        np.testing.assert_array_equal(values, want.numpy(), err_msg=name)
        seen[name][where] = True
    assert all(every.all() for every in seen.values()), "the ranks together hold the whole model"


@pytest.mark.parametrize("wrong", ["a damaged block", "a missing tensor", "another shape"])
def test_what_one_rank_finds_wrong_is_refused_on_every_rank(wrong: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    arrays = stored(folder, *MODEL)
    name = "weight/decoder.layers.0.mlp.experts.down"  # of the first stage alone
    overrides = (*MODEL, *TP2_PP2_VPP2)
    if wrong == "a damaged block":
        piece = CheckpointReader(folder).pieces[name][0]
        file = CheckpointReader(folder).files[piece.file]
        flip_bit(file.path, file.entry.header_bytes + piece.start)
        cause = "is damaged: its hash differs"
    elif wrong == "a missing tensor":
        del arrays[name]
        write_checkpoint(tmp_path / "less", dealt(arrays, 2))
        folder, cause = tmp_path / "less", f"has no tensor {name}"
    else:
        overrides, cause = (*overrides, "model.moe.ffn_hidden_size=80"), "the model needs"
    answers = run_ranks(4, _loaded, folder, overrides)
    assert all(isinstance(answer, str) and cause in answer for answer in answers), answers
