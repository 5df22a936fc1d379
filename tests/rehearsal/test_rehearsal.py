"""A rehearsal builds every kind of rank without its devices, and says so when anything does not fit together."""

import dataclasses
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.architecture.count import count_parameters
from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.architecture.trained import adapter_shapes
from gpt4moe.checkpoint.index import CheckpointIndex
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.saving import commit
from gpt4moe.checkpoint.storage import ITEM_BYTES
from gpt4moe.config.load import load_run_config
from gpt4moe.convert.weights import CheckpointWeights
from gpt4moe.errors import ConfigError, ConversionError, Gpt4MoeError, LayoutError
from gpt4moe.launch.evidence import needs
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.shard import BUFFER
from gpt4moe.planner.states import optimizer_bytes
from gpt4moe.rehearsal import command as rehearsal_command
from gpt4moe.rehearsal import rehearsal
from tests.distributed.case import BASE
from tests.spawn import run_ranks

EIGHT_RANKS = (*BASE, "parallel.tp=2", "parallel.pp=2", "parallel.ep=4", "precision=bf16")


def rehearsed(out: Path, *more: str) -> rehearsal.Rehearsal:
    run = load_run_config([*EIGHT_RANKS, *more])
    return rehearsal.rehearse(run, 8, out, (2, 2), on_start=lambda total: None, on_rank=lambda: None)


def data_bytes_of(done: rehearsal.Rehearsal) -> list[int]:
    """Of each file of a rehearsed checkpoint: weights and states, without headers and buffers."""
    assert done.checkpoint is not None
    index = CheckpointIndex(done.checkpoint.folder)
    sizes = {entry.name: entry.size - entry.header_bytes for entry in index.manifest.files}
    for name, pieces in index.pieces.items():
        for piece in pieces if name.startswith(BUFFER) else ():
            sizes[piece.file] -= ITEM_BYTES * prod(piece.shape)
    return list(sizes.values())


def require_planned(done: rehearsal.Rehearsal) -> None:
    """The files are as large as preflight says; the largest nearly, as Megatron cuts its buffers anywhere."""
    needed, sizes = needs(done.run, Layout.from_config(done.run.parallel, 8)), data_bytes_of(done)
    assert sum(sizes) == needed.checkpoint_bytes
    assert max(sizes) == pytest.approx(needed.rank_state_bytes, rel=0.1)


def test_eight_ranks_fit_together_and_their_files_open(tmp_path: Path) -> None:
    done = rehearsed(tmp_path / "out")
    assert done.problems == [] and done.not_rehearsed == []
    assert [report.rank for report in done.ranks] == list(range(8))
    assert done.checkpoint is not None and done.inference is not None
    total = count_parameters(done.run.model).total
    assert set(done.checkpoint.elements.values()) == {total}
    assert done.checkpoint.files == 8 and done.checkpoint.size_bytes > 12 * total  # fp32: weights, two moments
    require_planned(done)
    assert done.inference.files == 4 and done.inference.size_bytes > 2 * total
    assert list(CheckpointIndex(done.checkpoint.folder).problems()) == []  # every byte is there and hashes as said
    weights = CheckpointWeights(done.checkpoint.folder)
    whole = ((0, 0), weights.shapes["output_layer.weight"])
    assert all((values == 0).all() for values in weights.values("output_layer.weight", [whole]))
    assert json.loads(json.dumps(rehearsal_command.as_data(done, 1.0)))["fits_together"] is True


def test_ranks_that_train_adapters_fit_together(tmp_path: Path) -> None:
    done = rehearsed(tmp_path / "out", "stage=sft", "stage.lora.rank=8", "checkpoint.load=base")
    assert done.problems == [] and "adapters alone" in done.not_rehearsed[0]
    assert done.checkpoint is not None and done.inference is None
    adapters = sum(prod(shape) for shape in adapter_shapes(done.run.model).values())
    assert set(done.checkpoint.elements.values()) == {adapters}
    require_planned(done)


def test_ranks_of_a_vision_stage_fit_together_and_serving_files_are_of_its_text_model(tmp_path: Path) -> None:
    parts = (
        "stage=vision",
        "+vision@model.vision=tiny",
        "model.vision.cross_attention_every=3",
        "checkpoint.load=base",
    )
    done = rehearsed(tmp_path / "out", *parts)
    assert done.problems == [] and done.not_rehearsed == []
    assert done.checkpoint is not None and done.inference is not None
    model = done.run.model
    assert done.checkpoint.elements["weight"] == count_parameters(model).total
    require_planned(done)
    text = count_parameters(dataclasses.replace(model, vision=None)).total
    assert text < done.inference.size_bytes / 2 < count_parameters(model).total


def test_wrong_bytes_a_lost_tensor_and_a_part_written_twice_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(*args: Any) -> list[int]:
        return [size + (inside == 1) for inside, size in enumerate(optimizer_bytes(*args))]

    def other_model(model: Any) -> Any:
        shapes = logical_shapes(model)
        return shapes | {"decoder.final_layernorm.weight": (shapes["decoder.final_layernorm.weight"][0] + 5,)}

    monkeypatch.setattr(rehearsal, "optimizer_bytes", one_more)
    monkeypatch.setattr(rehearsal, "logical_shapes", other_model)
    problems = rehearsed(tmp_path / "bytes").problems
    assert [problem[:13] for problem in problems[:2]] == ["rank 1 holds ", "rank 5 holds "]
    assert len(problems) == 5 and all("elements, the model" in problem for problem in problems[2:])

    def doubled(folder: Path, manifest: Manifest, world_size: int) -> None:
        """Rank 1 wrote what rank 0 should have."""
        for path in folder.glob("rank-00001*"):
            copy = path.with_name(path.name.replace("00001", "00000"))
            copy.write_text(path.read_text().replace("00001", "00000")) if path.suffix == ".json" else (
                copy.write_bytes(path.read_bytes())
            )
        commit(folder, manifest, world_size)

    monkeypatch.undo()
    monkeypatch.setattr(rehearsal, "commit", doubled)
    (problem,) = rehearsed(tmp_path / "doubled").problems
    assert "overlap" in problem or "missing" in problem


def _group_problems(environment: Environment) -> list[str]:
    """Of rank 5, when the layout takes its last expert group for another."""
    from gpt4moe.parallel.meta_device import pretended_rank
    from gpt4moe.rehearsal import rank as rehearsal_rank

    layout = Layout.from_config(load_run_config([*EIGHT_RANKS]).parallel, 8)
    with pretended_rank(layout, 5) as groups:
        assert list(rehearsal_rank.group_problems(groups)) == []
        other = dataclasses.replace(groups, layout=dataclasses.replace(layout, ep=2))
        return list(rehearsal_rank.group_problems(other))


def test_a_group_that_is_not_the_layouts_is_named() -> None:
    (problems,) = run_ranks(1, _group_problems)
    assert problems == [
        "Megatron's group ep is [4, 5, 6, 7], the layout says [4, 5]",
        "Megatron's group expert_dp is [5], the layout says [5, 7]",
    ]


def test_roles_are_the_corners_of_each_kind_of_stage_and_its_fullest_and_every_stages_first() -> None:
    run = load_run_config(["run.name=x", "+experiment=gpt4"])
    layout = Layout.from_config(run.parallel, 24960)
    ranks = rehearsal.roles(run, layout, [stage * 1664 + 100 for stage in range(15)])
    corners = [0, 7, 15, 100, 1648, 1656, 1663]  # tp 0 and 7 at dp 0 and 207; ep 0 and 15 of the two outer copies
    assert ranks[:14] == corners + [1664 + inside for inside in corners]
    assert ranks[14:-7] == [stage * 1664 for stage in range(2, 14)]
    assert ranks[-7:] == [14 * 1664 + inside for inside in corners]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["+experiment=tiny", "ranks=many"], ConfigError),
        (["+experiment=tiny", "inference=8"], ConfigError),
        (["+experiment=tiny", "output=html"], ConfigError),
        (["+experiment=tiny", "parallel.tp=2", "ranks=3"], LayoutError),
        (["+experiment=tiny", "engine=deepspeed", "ranks=2"], ConfigError),
        (["+experiment=tiny", "inference=3x1", "ranks=2"], ConversionError),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(arguments: list[str], error: type[Gpt4MoeError]) -> None:
    with pytest.raises(error):
        rehearsal_command.run(rehearsal_command.read(arguments))


def test_a_folder_with_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    arguments = [*EIGHT_RANKS, "ranks=8", f"out={tmp_path}"]
    with pytest.raises(ConfigError, match="is not empty: it has mine") as caught:
        rehearsal_command.run(rehearsal_command.read(arguments))
    assert f"out={tmp_path / 'rehearsal'}." in caught.value.cure
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
