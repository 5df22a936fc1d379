"""Conversations in rows: each whole and once, sample n a function of the seed, packed or padded, long ones by key."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from gpt4moe.config.data import LongRows
from gpt4moe.config.run import RunConfig
from gpt4moe.data import conversations
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import check_data
from gpt4moe.data.conversations import Conversations, lay_out
from gpt4moe.data.folder import finish_folder, new_source, vocabulary_of
from gpt4moe.data.indexed import IndexedTokens
from gpt4moe.data.indexed_writer import PairWriter, token_dtype
from gpt4moe.data.loader import SampleStream, build_data
from gpt4moe.data.lookup import origin_of
from gpt4moe.data.manifest import Shard, SourceManifest
from gpt4moe.data.overview import overview, tokens_of_epochs
from gpt4moe.data.rows import OPEN_ROWS, RowLayout, pack
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError
from tests.data.conftest import SEQ_LENGTH, VOCAB_SIZE, small_run

SFT = ("stage=sft", "data.pack=false")


def chat_folder(folder: Path, tokenizer: Tokenizer, lengths: list[int], name: str = "chat") -> Path:
    """Conversation n: tokens n, n + 1, ...; of which the last third is learned."""
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    if not path.exists():
        tokenizer.backend.save(str(path))
    vocabulary = vocabulary_of(folder, tokenizer, path)
    with new_source(folder / name) as new:

        def written(split: str, half: int) -> tuple[list[Shard], list[Shard]]:
            pairs = [PairWriter(new / f"{split}-{kind}{half}", np.dtype(dtype))
                     for kind, dtype in (("", token_dtype(VOCAB_SIZE)), ("mask-", np.dtype("u1")))]  # fmt: skip
            for number, length in enumerate(lengths[half::2]):
                pairs[0].add((np.arange(length) + 2 * number + half) % VOCAB_SIZE)
                pairs[1].add(np.arange(length) >= length - max(1, length // 3))
            return tuple([pair.finish()] for pair in pairs)  # type: ignore[return-value]

        halves = [written("train", half) for half in (0, 1)]
        valid, valid_mask = written("valid", 0)
        SourceManifest(
            tokenizer_sha256=vocabulary.tokenizer_sha256, licence="CC0-1.0", description="", valid=valid,
            train=[*halves[0][0], *halves[1][0]],
            masks={"train": [*halves[0][1], *halves[1][1]], "valid": valid_mask},
        ).write(new)  # fmt: skip
    finish_folder(folder, vocabulary, path)
    return folder


LENGTHS = [2 + (7 * n) % 15 for n in range(60)]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat") / "data", tokenizer, LENGTHS)


def rows_of(run: RunConfig) -> Conversations:
    found = check_data(run).rows["train"]["chat"]
    assert isinstance(found, Conversations)
    return found


def learned(rows: Conversations) -> list[list[int]]:
    """The learned labels of every row, by conversation, sorted."""
    found = []
    for index in range(rows.num_rows):
        row = rows.row(index)
        documents = np.zeros(SEQ_LENGTH, dtype=int) if row.documents is None else row.documents
        for number in range(documents.max() + 1):
            labels = row.tokens[1:][(documents == number) & (row.loss_mask > 0)].tolist()
            found += [labels] if labels else []
    return sorted(found)


def test_packed_and_padded_rows_have_the_same_learned_labels_each_conversation_once(folder: Path) -> None:
    padded, packed = (rows_of(small_run(folder, "stage=sft", f"data.pack={value}")) for value in ("false", "true"))
    assert padded.num_rows == 60 > 1.5 * packed.num_rows
    assert learned(packed) == learned(padded) and len(learned(padded)) == 60
    assert packed.num_rows <= 1.1 * sum(LENGTHS) / (SEQ_LENGTH + 1) + 1


def test_a_row_is_its_conversations_one_after_the_other_and_the_first_token_of_none_is_learned(folder: Path) -> None:
    rows = rows_of(small_run(folder, "stage=sft"))
    for index in range(rows.num_rows):
        row = rows.row(index)
        assert row.documents is not None and row.num_tokens is not None
        starts = np.flatnonzero(np.diff(row.documents, prepend=-1))
        assert (np.diff(row.documents) >= 0).all() and row.documents[0] == 0
        ends = [start - 1 for start in starts[1:]]
        assert not row.loss_mask[ends].any(), "a document's last token predicts nothing"
        assert not row.loss_mask[row.num_tokens :].any()
        for start, end in zip(starts, [*starts[1:], SEQ_LENGTH], strict=True):
            inside = row.tokens[start : min(end, row.num_tokens)]
            assert (np.diff(inside) % VOCAB_SIZE == 1).all()


def test_padding_has_no_number_and_no_weight(folder: Path) -> None:
    stream = build_data(small_run(folder, *SFT)).train
    (batch,) = stream.micro_batches(0, global_batch_size=4, micro_batch_size=4, dp=1, dp_index=0)
    assert batch.token_ids is not None and batch.documents is None
    is_padding = batch.token_ids < 0
    assert is_padding.any() and not is_padding[:, 0].any() and not (batch.loss_mask.bool() & is_padding).any()
    assert batch.samples.tolist() == [0, 1, 2, 3] and (batch.loss_mask.sum(dim=1) >= 1).all()


def test_sample_n_is_a_function_of_the_seed_and_an_epoch_has_every_row_once(folder: Path) -> None:
    def drawn(stream: SampleStream, count: int) -> list[bytes]:
        return [stream.sample(n).tokens.tobytes() for n in range(count)]

    stream = build_data(small_run(folder, "stage=sft", "training.steps=2")).train
    longer = build_data(small_run(folder, "stage=sft", "training.steps=20", "training.global_batch_size=4")).train
    count = rows_of(small_run(folder, "stage=sft")).num_rows
    assert drawn(stream, 2 * count) == drawn(longer, 2 * count)
    first, second = (drawn(stream, 2 * count)[part] for part in (slice(count), slice(count, None)))
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == count
    assert drawn(build_data(small_run(folder, "stage=sft", "run.seed=9")).train, count) != first


@pytest.mark.parametrize("is_packed", ["true", "false"])
def test_a_conversation_longer_than_the_context_is_refused_cut_or_split_by_key(
    tokenizer: Tokenizer, tmp_path: Path, is_packed: str
) -> None:
    made = chat_folder(tmp_path / "data", tokenizer, [*LENGTHS, 20, 50])
    run = ("stage=sft", f"data.pack={is_packed}")
    with pytest.raises(DataError, match=r"2 of 62 train conversations .* longest has 50: number 30 of .*train-1.bin"):
        check_data(small_run(made, *run))
    cut = rows_of(small_run(made, *run, "data.long_rows=cut"))
    # Of 20 tokens the last 6 are learned, 3 of them within the first 17; of 50 the last 16, none within.
    assert (cut.num_long, cut.num_left_out) == (2, 1)
    assert "61 conversations" in cut.summary() and "2 longer than the context, 1 parts" in cut.summary()
    assert sum(map(len, learned(cut))) == sum(max(1, n // 3) for n in LENGTHS) + 3
    split = rows_of(small_run(made, *run, "data.long_rows=split"))
    assert (split.num_long, split.num_left_out) == (2, 2)
    assert sum(map(len, learned(split))) == sum(max(1, n // 3) for n in [*LENGTHS, 20, 50])


def test_plain_text_is_refused_and_a_mask_of_other_tokens_too(
    folder: Path, data_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="is plain text"):
        check_data(small_run(data_folder, *SFT))
    check_data(small_run(folder, "data.chat_as_text=true"))  # pre-training reads them as text, where told to
    made = chat_folder(tmp_path / "data", tokenizer, [*LENGTHS, 9])
    manifest = SourceManifest.read(made / "chat")
    assert manifest.train[0].tokens != manifest.train[1].tokens
    other = {"train": manifest.masks["train"][::-1], "valid": manifest.masks["valid"]}
    dataclasses.replace(manifest, masks=other).write(made / "chat")
    with pytest.raises(DataError, match="not of its tokens"):
        check_data(small_run(made, *SFT))


def test_packing_fills_rows_and_never_more_than_they_hold() -> None:
    lengths = np.random.default_rng(1).integers(2, 700, size=5000)
    rows = pack(lengths, 1025)
    sums = np.bincount(rows, weights=lengths)
    assert sums.max() <= 1025 and sums.mean() > 0.97 * 1025
    many = pack(np.full(5 * OPEN_ROWS, 513), 1025)
    assert many.tolist() == list(range(5 * OPEN_ROWS)), "no room for two, and no more open rows than that"


def test_where_a_sample_comes_from_is_its_first_conversation(folder: Path) -> None:
    run = small_run(folder, "stage=sft")
    origin, tokens = origin_of(run, check_data(run), 5)
    document = IndexedTokens(Path(origin.file).with_suffix("")).document(origin.document)
    assert tokens[: len(document)] == document.tolist() and origin.token_in_document == 0


def test_how_conversations_are_laid_out_is_part_of_the_run_s_identity(folder: Path) -> None:
    found = {
        check_data(small_run(folder, "stage=sft", *more)).identity["data"]
        for more in ([], ["data.pack=false"], ["data.long_rows=cut"])
    }
    assert len(found) == 3


def test_without_shares_a_source_counts_by_its_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = chat_folder(tmp_path / "data", tokenizer, [3] * 40, "short")
    chat_folder(made, tokenizer, [15] * 40, "long")
    run = small_run(made, *SFT, "training.steps=40", "training.global_batch_size=2")
    assert check_data(run).phases[0].shares == {"long": 0.5, "short": 0.5}
    # 40 rows each; the packed stretches of S tokens would be 37 and 7
    assert [source["epochs"] for source in overview(run)["sources"]] == pytest.approx([1, 1], abs=0.1)


def test_epochs_of_conversations_are_passes_over_their_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = chat_folder(tmp_path / "data", tokenizer, LENGTHS)
    run = small_run(made, *SFT, "training.global_batch_size=2")
    run.training.steps = run.step_sizes.steps(tokens_of_epochs(run, 3))
    (source,) = overview(run)["sources"]
    assert source["epochs"] == pytest.approx(3, abs=2 / len(LENGTHS))
    packed = small_run(made, "stage=sft", "training.global_batch_size=2")
    assert tokens_of_epochs(packed, 3) < 0.7 * tokens_of_epochs(run, 3)


@pytest.mark.parametrize("bit", [1, 20, 63])
def test_a_flipped_bit_of_an_index_is_found(tokenizer: Tokenizer, tmp_path: Path, bit: int) -> None:
    made = chat_folder(tmp_path / "data", tokenizer, LENGTHS)
    path = made / "chat" / "train-0.idx"
    damaged = bytearray(path.read_bytes())
    damaged[34 + 4 * 30 + 8 * 3 + bit // 8] ^= 1 << bit % 8  # the offset of a document
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"train-0\.idx is damaged"):
        check_data(small_run(made, *SFT))


@pytest.mark.parametrize("images", [False, True])
def test_a_piece_goes_into_the_fullest_open_row_with_room(images: bool) -> None:
    random = np.random.default_rng(3)
    lengths, more = random.integers(2, 400, 3000), random.integers(0, 5, 3000) * images
    wanted, room = [], []  # of the open rows: tokens left, row, images left
    for length, number in zip(lengths.tolist(), more.tolist(), strict=True):
        fits = [one for one in room if one[0] >= length and one[2] >= number]
        left, row, free = min(fits) if fits else (1025, max(wanted, default=-1) + 1, 6)
        room = sorted([*(one for one in room if one[1] != row), (left - length, row, free - number)])[-OPEN_ROWS:]
        wanted.append(row)
    found = pack(lengths, 1025, more, 6) if images else pack(lengths, 1025)
    assert found.tolist() == wanted


@pytest.mark.parametrize("long_rows", [LongRows.cut, LongRows.split])
@pytest.mark.parametrize("stretch", [7, 1 << 20])
def test_a_part_is_kept_where_it_has_a_learned_token(
    long_rows: LongRows, stretch: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "_STRETCH", stretch)
    source = Catalogue.open([chat_folder(tmp_path / "data", tokenizer, [3, 40, 9, 55, 90, 4])]).sources["chat"]
    layout = RowLayout(seq_length=8, seed=1, is_packed=False, long_rows=long_rows, padding_id=0)
    mask, wanted = source.mask("train")[:], []
    starts = [*np.flatnonzero(source.tokens("train").begins(slice(0, len(mask)))).tolist(), len(mask)]
    for start, end in itertools.pairwise(starts):
        for at in range(start, end - 1, 8):
            if at == start or long_rows is LongRows.split:
                stop = min(at + 9, end)
                wanted += [(at, stop - at)] if mask[at + 1 : stop].any() else []
    pieces = lay_out(source, "train", layout).pieces
    assert sorted(zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)) == wanted
