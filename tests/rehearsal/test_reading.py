"""128 ranks, tp 8 x pp 16 with uneven stages: each reads its own inference file, all of it, and nothing else."""

from math import prod
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.convert import inference_grid
from gpt4moe.convert.inference_layout import open_inference_layout
from gpt4moe.convert.weights import FolderWeights
from gpt4moe.parallel.environment import Environment
from gpt4moe.rehearsal.files import write_inference
from gpt4moe.rehearsal.rehearsal import Rehearsal, rehearse
from tests.distributed.case import BASE
from tests.spawn import run_ranks

# GPT-4's kind of layers in small: heads, query groups and experts that tp 8 divides; 24 layers over 16 stages.
NARROW = (
    *BASE, "precision=bf16", "model.num_layers=24", "model.num_attention_heads=8", "model.num_query_groups=8",
    "model.moe.num_experts=16",
)  # fmt: skip
SIZES = [2] * 8 + [1] * 8


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    run, out = load_run_config([*NARROW]), tmp_path_factory.mktemp("narrow") / "out"
    return rehearse(run, 1, out, (8, 16), on_start=lambda _: None, on_rank=lambda: None)


def test_every_shard_is_read_by_exactly_the_rank_that_needs_it(done: Rehearsal) -> None:
    assert done.problems == [] and done.not_rehearsed == [] and done.inference is not None
    assert done.inference.layers_per_stage == SIZES
    reads, weights = done.inference.reads, open_inference_layout(done.inference.folder)
    stored = [piece for held in (weights.pieces, weights.copies) for pieces in held.values() for piece in pieces]
    assert reads is not None and reads.ranks == 128 and reads.shards == len(stored)
    assert reads.total_bytes == sum(2 * prod(piece.shape) for piece in stored)
    assert 1.8 < reads.most_bytes / reads.least_bytes < 2.3  # stages of two layers, and of one


NAMES_OF = inference_grid._names_of


def _one_more(*where: Any) -> list[str]:
    """A grid that gives every stage the final norm."""
    return list(dict.fromkeys([*NAMES_OF(*where), "decoder.final_layernorm.weight"]))


def _faults(_: Environment, folder: Path, more: Path) -> dict[str, list[str]]:
    """Problems that a stage's reading shows under a planted fault."""
    from gpt4moe.rehearsal.reading import read_stage

    found = {"none": read_stage(folder, 8, SIZES, 3).problems}
    # The loader's stages are not the folder's: stage 7 has one layer, and stage 8 two.
    found["other stages"] = read_stage(folder, 8, [*[2] * 7, 1, 2, *[1] * 7], 8).problems
    inference_grid._names_of = _one_more
    found["unread"] = read_stage(more, 8, SIZES, 3).problems
    inference_grid._names_of = NAMES_OF
    FolderWeights.prefer_rank = lambda *_: None  # type: ignore[method-assign]
    found["no preference"] = read_stage(folder, 8, SIZES, 3).problems
    return found


def test_a_shard_read_by_another_rank_or_by_nobody_is_named(
    done: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert done.inference is not None and done.checkpoint is not None
    monkeypatch.setattr(inference_grid, "_names_of", _one_more)
    write_inference(done.checkpoint.folder, tmp_path / "more", 8, 16)
    monkeypatch.undo()
    (found,) = run_ranks(1, _faults, done.inference.folder, tmp_path / "more")
    assert found["none"] == []
    stray = "rank 64 (tp 0, pp 8) reads decoder.layers.15.input_layernorm.weight@0 of tp-00-pp-07.safetensors"
    assert any(problem.startswith(stray) for problem in found["other stages"])
    assert found["unread"] == [
        f"rank {24 + tp} (tp {tp}, pp 3) does not read decoder.final_layernorm.weight@0 of its file "
        f"tp-0{tp}-pp-03.safetensors: nobody needs it there"
        for tp in range(8)
    ]
    first, *_ = found["no preference"]
    assert first.startswith("rank 25 (tp 1, pp 3) reads ") and first.endswith("another rank's")
