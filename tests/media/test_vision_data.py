"""stage=vision reads documents with images beside plain text: mixed, in exact order, resumed, in batches."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data import image_rows
from gpt4moe.data.batch import Batch
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import check_data
from gpt4moe.data.image_files import IMAGE, ImageStore
from gpt4moe.data.indexed import IndexedTokens
from gpt4moe.data.loader import SampleStream, build_data
from gpt4moe.data.lookup import origin_of
from gpt4moe.data.overview import overview
from gpt4moe.data.prefetch import Prefetch
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.rows import RowSamples, documents_of
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.evaluation.corpus import read_sources
from gpt4moe.evaluation.in_loop import read_probes
from gpt4moe.evaluation.interleaved import view_of
from gpt4moe.inference.text import words_of_data
from tests.inference.tool import TOOL, generate
from tests.media.conftest import VOCAB_SIZE
from tests.media.test_image_rows import documents, folder_of
from tests.training.command import metrics, train

SIZES = (f"model.vocab_size={VOCAB_SIZE}", "model.seq_length=48", "training.global_batch_size=4",
         "training.micro_batch_size=2", "training.steps=20")  # fmt: skip
PARTS = ("+vision@model.vision=tiny", "model.vision.encoder.image_size=16", "model.vision.encoder.hidden_size=16",
         "model.vision.encoder.num_layers=1", "model.vision.encoder.ffn_hidden_size=16",
         "model.vision.resampler.num_latents=4", "model.vision.ffn_hidden_size=24")  # fmt: skip
VISION = ("stage=vision", *PARTS)
MIXED = ("++data.sources={web: 0.6, prose: 0.4}",)


@pytest.fixture(scope="module")
def folder(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources web, with images, and prose, without."""
    root = tmp_path_factory.mktemp("vision")
    source = folder_of(root, tokenizer_path, documents(40))
    out: Path = source.folder.parent
    texts = [f"thing {number} and word{number} " * 9 for number in range(30)]
    prose = SourceText(train=texts, valid=texts, licence="CC0-1.0", description="")
    write_data_folder(out, {"prose": prose}, out / "tokenizer.json", lambda amount: None)
    return out


def run_of(folder: Path, *overrides: str) -> RunConfig:
    return load_run_config(["+experiment=tiny", "run.name=t", f"data.path={folder}", *SIZES, *overrides])


def batches(stream: SampleStream, consumed: int, dp: int = 1, size: int = 2) -> list[list[Batch]]:
    return [stream.micro_batches(consumed, global_batch_size=4, micro_batch_size=size, dp=dp, dp_index=rank)
            for rank in range(dp)]  # fmt: skip


def test_documents_with_images_and_plain_text_are_mixed_and_no_document_sees_another_s_image(folder: Path) -> None:
    stream = build_data(run_of(folder, *VISION, *MIXED)).train
    kinds = [0, 0]
    for n in range(100):
        sample = stream.sample(n)
        kinds[sample.source_index] += 1
        assert sample.documents is not None
        if sample.source_index == 0:  # prose: names are sorted
            assert sample.media is None and not sample.images
            continue
        assert sample.media is not None
        for number in range(1, len(sample.images) + 1):
            seen_by = set(sample.documents[sample.media == number].tolist())
            assert len(seen_by) == 1, "an image is seen within one document"
    assert kinds[0] == pytest.approx(40, abs=12)


def test_a_batch_has_the_frames_of_all_its_rows_and_text_rows_look_at_none(folder: Path) -> None:
    stream = build_data(run_of(folder, *VISION, *MIXED)).train
    samples = [stream.sample(n) for n in range(4)]
    (batch,) = batches(stream, 0, size=4)[0]
    assert batch.media is not None and batch.pixels is not None and batch.image_frames is not None
    assert batch.pixels.shape == (int(batch.image_frames.sum()), 3, 16, 16) and batch.pixels.dtype == torch.uint8
    assert len(batch.image_frames) == sum(len(sample.images) for sample in samples)
    for row, sample in enumerate(samples):
        assert batch.media[row].max() == len(sample.images)
    shown = [frame for sample in samples for frames in sample.images for frame in frames]
    np.testing.assert_array_equal(batch.pixels.permute(0, 2, 3, 1).numpy(), np.stack(shown))


def test_the_samples_of_a_step_are_the_same_on_every_layout_and_after_a_restart(folder: Path) -> None:
    run = run_of(folder, *VISION, *MIXED)
    stream, again = build_data(run).train, build_data(run_of(folder, *VISION, *MIXED, "training.steps=40")).train
    whole = [batch.tokens for batch in batches(stream, 8)[0]]
    cut = [made[0].tokens for made in batches(again, 8, dp=2)]
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    other = build_data(run_of(folder, *VISION, *MIXED, "run.seed=9")).train
    assert [stream.sample(n).tokens.tolist() for n in range(9)] != [other.sample(n).tokens.tolist() for n in range(9)]


def test_an_epoch_has_every_row_once_and_a_phase_goes_on_where_each_source_was(folder: Path) -> None:
    phases = "data.phases=[{from_tokens: 480, shares: {prose: 1}}, {from_tokens: 960, shares: {web: 1}}]"
    run = run_of(folder, *VISION, "++data.sources={web: 1}", phases)
    samples = build_data(run).train.samples
    assert isinstance(samples, RowSamples)
    count = samples.sources["web"].num_rows
    draws = [samples.place(n) for n in range(20 + 3 * count)]
    assert [draw.source for draw, _ in draws[:21]] == ["web"] * 10 + ["prose"] * 10 + ["web"]
    web = [(draw.epoch, row) for draw, row in draws if draw.source == "web"]
    for epoch in range(2):
        assert sorted(row for at, row in web if at == epoch) == list(range(count))
    assert [row for at, row in web if at == 0] != [row for at, row in web if at == 1]
    assert samples.consumed(20) == {"prose": 10, "web": 10}


def test_images_are_decoded_in_the_thread_that_makes_batches(folder: Path) -> None:
    run = run_of(folder, *VISION, "++data.sources={web: 1}")
    stream, names, decode = build_data(run).train, set(), image_rows.decode

    def noted(data: bytes, size: int) -> Any:
        names.add(threading.current_thread().name)
        return decode(data, size)

    with patch.object(image_rows, "decode", noted):
        prefetch = Prefetch(lambda consumed: batches(stream, consumed)[0], torch.device("cpu"))
        first = prefetch.take(0, following=4)
        prefetch.take(4, following=None)
        prefetch.close()
    assert any(batch.pixels is not None for batch in first)
    assert {name.rpartition("_")[0] for name in names} == {"samples"}


def test_images_of_micro_batches_without_pixels_are_counted_and_not_read(folder: Path) -> None:
    stream, read = build_data(run_of(folder, *VISION, *MIXED)).train, []
    (whole,) = batches(stream, 8, size=1)

    def noted(store: ImageStore, number: int) -> bytes:
        read.append(number)
        return good(store, number)

    good = ImageStore.read
    with patch.object(ImageStore, "read", noted):
        counted = stream.micro_batches(
            8, global_batch_size=4, micro_batch_size=1, dp=1, dp_index=0, with_pixels=slice(1, None, 2)
        )
    wanted = [number % 2 == 1 and batch.pixels is not None for number, batch in enumerate(whole)]
    assert [batch.pixels is not None for batch in counted] == wanted
    assert len(read) == sum(len(batch.pixels) for batch in whole[1::2] if batch.pixels is not None) > 0
    for one, other in zip(whole, counted, strict=True):
        for name in ("tokens", "loss_mask", "documents", "media", "image_frames", "image_rows"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name


def frames_of(run: RunConfig, numbers: range) -> set[int]:
    """The images of some samples, by their numbers in the source web."""
    samples, found = build_data(run).train.samples, set()
    assert isinstance(samples, RowSamples)
    for draw, row in map(samples.place, numbers):
        rows = samples.sources[draw.source]
        assert isinstance(rows, image_rows.ImageRows)
        found |= {int(number) for _, stretch in rows.stretches(row)
                  for number in rows.frames.between(stretch.start, stretch.stop)["image"]}  # fmt: skip
    return found


def test_an_image_that_one_rank_finds_damaged_ends_every_rank_with_its_error(folder: Path, tmp_path: Path) -> None:
    """Of two stages each reads the images of one micro-batch of two. The second's are damaged; the first reports it."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    words = (*SIZES, *VISION, "++data.sources={web: 1}", "data=demo", f"data.path={data}")
    run = run_of(data, *VISION, "++data.sources={web: 1}")
    store = Catalogue.open([data]).sources["web"].images("train")
    number = min(frames_of(run, range(2, 4)) - frames_of(run, range(2)))
    (shard,) = store.shards
    table = np.fromfile(data / "web" / f"{shard.file}.table", dtype=IMAGE)
    with (data / "web" / f"{shard.file}.img").open("r+b") as file:
        file.seek(int(table[number]["start"]) + 3)
        file.write(b"?")
    ended = train(tmp_path / "run", *words, "parallel.pp=2", "training.steps=2", ranks=2)
    assert [rank.status for rank in ended] == [2, 2], ended
    cause, cure = ended[0].err.splitlines()
    assert f"is damaged: image {number}, at byte" in cause and "Restore the file" in cure
    assert ended[1].err == ""


def test_what_a_run_reads_is_known_and_part_of_its_identity(folder: Path) -> None:
    run = run_of(folder, *VISION, *MIXED)
    checked = check_data(run)
    assert {name: rows.num_rows for name, rows in checked.rows["train"].items()}.keys() == {"web", "prose"}
    assert [source["source"] for source in overview(run)["sources"]] == ["prose", "web"]
    origin, tokens = origin_of(run, checked, 0)
    document = IndexedTokens(Path(origin.file).with_suffix("")).document(origin.document)
    found = document.tolist()[origin.token_in_document :][: len(tokens)]
    assert tokens[: len(found)] == found
    others = [[], ["data.pack=false"], ["data.max_images=3"], ["data.long_rows=split"]]
    assert len({check_data(run_of(folder, *VISION, *MIXED, *more)).identity["data"] for more in others}) == 4


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stage=pretrain"], "stage=pretrain, and source web has images"),
        (["stage=sft"], "source prose of .* is plain text"),
        ([*VISION, "++data.sources={prose: 1}"], "no source of .* that is read has images: prose"),
        ([*VISION, "model.seq_length=8"], "documents 3\\d have more tokens than the context"),
        ([*VISION, "data.max_images=1"], "have more images than data.max_images=1"),
        ([*VISION, "model.vision.resampler.max_frames=1"], "have more frames than model.vision.resampler.max_frames=1"),
        ([*VISION, "data.max_images=0"], "data.max_images=0 is below 1"),
        ([*VISION, "data.document_mask=true"], "data.document_mask=true with stage=vision"),
    ],
)
def test_what_a_stage_does_not_read_is_refused(folder: Path, overrides: list[str], told: str) -> None:
    with pytest.raises((DataError, ConfigError), match=told):
        check_data(run_of(folder, *overrides))


def test_text_sources_of_the_folder_are_trained_on_as_ever(folder: Path) -> None:
    sample = build_data(run_of(folder, "++data.sources={prose: 1}")).train.sample(3)
    assert sample.media is None and sample.documents is None


def test_a_run_of_the_vision_stage_resumes_with_the_losses_of_one_that_was_not_stopped(
    folder: Path, tmp_path: Path
) -> None:
    words = (*SIZES, *VISION, *MIXED, "data=demo", f"data.path={folder}", "schedule.warmup_steps=0")
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            (ended,) = train(tmp_path / name, *words, f"training.steps={steps}", "checkpoint.every=2")
            assert ended.status == 0, ended.err
    whole, stopped = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "stopped"))
    assert len(whole) == 4 and whole == stopped


def test_the_loss_of_a_source_with_images_is_that_of_the_run_s_own_evaluation(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "own", tokenizer_path, documents(40))
    other = [[part if isinstance(part, str) else 90 for part in parts] for parts in documents(40)]
    folder_of(tmp_path / "other", tokenizer_path, other)
    data = tmp_path / "own" / "data"
    # One step opens the gates by the learning rate.
    words = (*SIZES, *VISION, "data=demo", f"data.path={data}", "data.pack=false", "schedule.warmup_steps=0",
             "optimizer.lr=0.05", "model.init_std=0.3")  # fmt: skip
    (ended,) = train(tmp_path / "run", *words, "training.steps=1", "training.eval_samples=40")
    assert ended.status == 0, ended.err
    (record,) = metrics(tmp_path / "run")
    found, unlike = (_loss(tmp_path / "run", tmp_path / name / "data") for name in ("own", "other"))
    pieces = documents_of(source.tokens("valid"))
    assert source.manifest.images is not None and len(pieces.starts) == 40
    tokens = source.tokens("valid")[: int(pieces.lengths.sum())]
    is_label = tokens != source.manifest.images.image_id
    is_label[pieces.starts] = False
    assert found["tokens"] == is_label.sum()
    assert found["loss"] == pytest.approx(record["eval_loss"], rel=1e-5)
    assert abs(unlike["loss"] - found["loss"]) > 1e-3, "other images"
    run = run_of(data, *VISION)
    words_of_run = words_of_data(run)
    assert words_of_run is not None
    (few,) = read_sources(data, words_of_run, max_tokens=60, view=view_of(run))
    (whole,) = read_sources(data, words_of_run, max_tokens=None, view=view_of(run))
    assert 2 < len(few.pieces) < len(whole.pieces) == 40 and whole.num_bytes == found["bytes"]


def _loss(run: Path, data: Path) -> dict[str, Any]:
    (ended,) = generate(run, "--data", data, "--json", tool=TOOL.with_name("evaluate.py"))
    assert ended.status == 0, ended.err
    (found,) = json.loads(ended.out)["sources"]
    return dict(found)


def test_evaluation_between_and_beside_steps_refuses_what_it_would_not_see(folder: Path) -> None:
    run = run_of(folder, *VISION, *MIXED, "training.sample_every=1", "training.sample_prompts=['a <image>']")
    with pytest.raises(ConfigError, match="prompts without images"):
        read_probes(run)
    words = words_of_data(run)
    assert words is not None
    with pytest.raises(DataError, match=r"Source web of .* has documents with images"):
        read_sources(folder, words, max_tokens=None)
