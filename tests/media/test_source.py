"""Documents with images become a source: tokens, each distinct image once, what was bad listed or refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from PIL import Image

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.command import answer
from gpt4moe.data.pictures import ImageLimits
from gpt4moe.data.tokenizer import load_tokenizer, train_tokenizer
from gpt4moe.errors import DataError
from gpt4moe.media.source import MediaFiles, write_media_source
from tests.media.conftest import documents, image, pairs, words, write_lines
from tools.prepare_media import main


def test_documents_and_their_images_are_stored_in_order_and_read_back(tokenizer_path: Path, tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(image(number // 2))  # every second is a copy
    rows: list[Any] = [
        {"text": f"<image>one {n} <image>two", "images": [f"{n}.png", [f"{n}.png", f"{n + 1}.png"]]} for n in range(6)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    files = MediaFiles(train=[path], valid=[path], licence="CC0-1.0")
    count = write_media_source(tmp_path / "data", "web", files, tokenizer_path, token="<image>", shard_bytes=80)
    catalogue = Catalogue.open([tmp_path / "data"])
    catalogue.require_whole()
    source = catalogue.sources["web"]
    assert len(source.manifest.train) > 1 and source.manifest.images is not None
    assert len(source.manifest.images.shards["train"]) > 1
    for split in ("train", "valid"):
        assert [text for text, _ in documents(source, split, tokenizer_path)] == [
            f"<image>one {n} <image>two<|endoftext|>" for n in range(6)
        ]
        assert [images for _, images in documents(source, split, tokenizer_path)] == [
            [[image(n // 2)], [image(n // 2), image((n + 1) // 2)]] for n in range(6)
        ]
    one = count.splits["train"]
    assert (one.documents, one.images, one.frames, one.distinct) == (6, 12, 18, 4)
    assert (one.most_images, one.most_frames) == (2, 2)
    assert answer("verify", [str(tmp_path / "data")]).status == 0


def test_the_files_are_the_same_for_any_number_of_workers(tokenizer_path: Path, tmp_path: Path) -> None:
    path = pairs(tmp_path / "a", 30)
    for workers in ("1", "5"):
        assert main(words(tokenizer_path, tmp_path / workers, path, "--workers", workers)) == 0
    found = [{file.name: file.read_bytes() for file in (tmp_path / workers / "a").iterdir()} for workers in ("1", "5")]
    assert found[0] == found[1] and len(found[0]) == 15


BAD = {
    3: b"", 5: image(5)[:-30], 7: b"<svg></svg>", 9: image(9, "TIFF"), 11: image(11, size=(900, 800)),
    13: image(13, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6))]),
}  # fmt: skip


def test_bad_images_are_counted_listed_and_left_out_up_to_a_share(
    tokenizer_path: Path, tmp_path: Path, capsys: Any
) -> None:
    path = pairs(tmp_path / "a", 40, lambda number: BAD.get(number, image(number)))
    (tmp_path / "a" / "15.png").unlink()
    out = tmp_path / "data"
    asked = words(tokenizer_path, out, path, "--max-pixels", "100000")
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "7 of 40 images are bad (17.5%), more than 1.0%" in told and f"{path}:4: 3.png: it is empty" in told
    assert not (out / "a").exists()
    listed = [json.loads(line) for line in (out / "a.bad_images.jsonl").read_text().splitlines()]
    assert [one["image"] for one in listed] == [f"{number}.png" for number in range(3, 17, 2)]
    reasons = [one["reason"] for one in listed]
    told = ("empty", "not whole", "no image of", "no image of", "900 x 800 pixels, more than", "animated", "No such")
    assert [part for part, reason in zip(told, reasons, strict=True) if part not in reason] == []
    assert main([*asked, "--max-bad", "0.2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["a"]
    assert facts["bad_images"] == facts["skipped"] == 7
    assert facts["train"]["documents"] + facts["valid"]["documents"] == 33
    assert [json.loads(line) for line in (out / "a" / "bad_images.jsonl").read_text().splitlines()] == listed


def test_a_bad_image_leaves_the_rest_of_its_document(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "b.png").write_bytes(image(1)[:40])
    row = {"text": "x<image>y<image>z<image>", "images": ["a.png", ["a.png", "b.png"], "a.png"]}
    path = write_lines(tmp_path / "a.jsonl", [row])
    files = MediaFiles(train=[path], valid=[path], max_bad_share=0.5)
    write_media_source(tmp_path / "data", "web", files, tokenizer_path, token="<image>")
    source = Catalogue.open([tmp_path / "data"]).sources["web"]
    one = [image(1)]
    assert documents(source, "train", tokenizer_path) == [("x<image>yz<image><|endoftext|>", [one, one])]


def test_bad_lines_are_an_error_or_listed(tokenizer_path: Path, tmp_path: Path, capsys: Any) -> None:
    path = pairs(tmp_path / "a", 12)
    more = [{"text": "a <image>", "images": []}, "{", {"image": "../../x.png", "caption": "a"}]
    write_lines(path, [*path.read_text().splitlines(), *more])
    asked = words(tokenizer_path, tmp_path / "data", path, "--max-bad", "0.5")
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "2 documents are none" in told and "pairs.jsonl:13: an image tag without an image" in told
    assert "pairs.jsonl:14 is no JSON" in told and not (tmp_path / "data" / "a").exists()
    assert main([*asked, "--bad-rows", "skip"]) == 0
    listed = [json.loads(line)["where"] for line in (tmp_path / "data/a/skipped.jsonl").read_text().splitlines()]
    assert listed == [f"{path}:{number}" for number in (13, 14, 15)]
    bad = json.loads((tmp_path / "data/a/bad_images.jsonl").read_text())
    assert bad["reason"] == "its name leads out of the images' folder"


def test_a_folder_of_pairs_and_clips(tokenizer_path: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "pairs"
    (folder / "clip").mkdir(parents=True)
    for number in (0, 2, 10):
        (folder / "clip" / f"{number}.png").write_bytes(image(number))
    (folder / "clip.txt").write_text("A clip.\n")
    (folder / "cat.jpg").write_bytes(image(3, "JPEG"))
    (folder / "cat.txt").write_text("A cat.\n")
    write = {"train": [folder], "valid": [folder]}
    write_media_source(tmp_path / "data", "a", MediaFiles(**write), tokenizer_path, token="<image>")
    source = Catalogue.open([tmp_path / "data"]).sources["a"]
    assert documents(source, "train", tokenizer_path) == [
        ("<image>A cat.<|endoftext|>", [[image(3, "JPEG")]]),
        ("<image>A clip.<|endoftext|>", [[image(0), image(2), image(10)]]),
    ]
    (folder / "dog.jpg").write_bytes(image(4))
    (folder / "owl.txt").write_text("An owl.")
    assert main(words(tokenizer_path, tmp_path / "data", folder)) == 2
    told = capsys.readouterr().err
    assert "an image without a caption: dog.jpg" in told and "a caption without an image: owl.txt" in told


def test_a_tokenizer_without_an_image_token_is_refused_and_given_one_when_asked(
    tokenizer_path: Path, tmp_path: Path, capsys: Any
) -> None:
    plain = tmp_path / "plain.json"
    train_tokenizer([f"word{i} and thing {i}\n" for i in range(200)], vocab_size=300).backend.save(str(plain))
    path = pairs(tmp_path / "a", 12)
    assert main(words(plain, tmp_path / "data", path)) == 2
    assert "has no token <image>" in capsys.readouterr().err
    for how, size, number in (("grow", 301, 300), ("replace", 300, 299)):
        out = tmp_path / how
        assert main(words(plain, out, path, "--add-image-token", how)) == 0
        catalogue = Catalogue.open([out])
        manifest = catalogue.sources["a"].manifest
        assert catalogue.vocabulary.vocab_size == size
        assert manifest.images is not None and manifest.images.image_id == number
        made = load_tokenizer(out / "tokenizer.json")
        for text in ("word7 and thing 12\n", "a <image> b", "\u00e9\u4e2d"):
            assert made.decode(made.encode(text)) == text and number not in made.encode(text)
        assert main(words(out / "tokenizer.json", out, path)) == 0
    assert main(words(plain, tmp_path / "grow", path, "--add-image-token", "grow")) == 2
    assert "has a tokenizer already" in capsys.readouterr().err
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "replace/tokenizer.json")).get_vocab_size() == 300


@pytest.mark.parametrize("name", ["../a", "b/a", "a b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tokenizer_path: Path, tmp_path: Path, name: str) -> None:
    files = MediaFiles(train=[pairs(tmp_path / "a", 12)])
    with pytest.raises(DataError, match="cannot name a source"):
        write_media_source(tmp_path / "data", name, files, tokenizer_path, token="<image>")
    assert not (tmp_path / "data").exists()


def test_held_out_documents_share_no_first_image_with_the_others(tokenizer_path: Path, tmp_path: Path) -> None:
    path = pairs(tmp_path / "a", 60, lambda number: image(number // 3))
    assert main(words(tokenizer_path, tmp_path / "data", path)) == 0
    source = Catalogue.open([tmp_path / "data"]).sources["a"]
    train, valid = (
        {images[0][0] for _, images in documents(source, split, tokenizer_path)} for split in ("train", "valid")
    )
    assert train and valid and not train & valid


def test_damaged_images_and_tables_are_found(tokenizer_path: Path, tmp_path: Path) -> None:
    path = pairs(tmp_path / "a", 20)
    assert main(words(tokenizer_path, tmp_path / "data", path)) == 0
    folder = tmp_path / "data" / "a"
    source = Catalogue.open([tmp_path / "data"]).sources["a"]
    for name, told in (
        ("train-images-00000.img", "image 2, at byte"), ("train-images-00000.table", "table is damaged"),
        ("train-00000.frames", "frames is damaged"),
    ):  # fmt: skip
        content = bytearray((folder / name).read_bytes())
        content[180] ^= 4
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=told):
            source.frames("train").between(0, 5)
            [source.images("train").read(number) for number in range(len(source.images("train")))]
        found = answer("verify", [str(tmp_path / "data")])
        assert found.status == 1 and told in found.lines[0]
        content[180] ^= 4
        (folder / name).write_bytes(content)
    (folder / "train-images-00000.img").write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes, the manifest says") as error:
        Catalogue.open([tmp_path / "data"]).require_whole()
    (folder / "train-images-00000.img").unlink()
    with pytest.raises(DataError, match="is missing") as gone:
        Catalogue.open([tmp_path / "data"]).require_whole()
    assert "tools/prepare_media.py" in error.value.cure and "tools/prepare_media.py" in gone.value.cure


def test_images_are_part_of_the_data_s_hash(tokenizer_path: Path, tmp_path: Path) -> None:
    hashes = []
    for shift in (0, 0, 1):
        out = tmp_path / f"data{len(hashes)}"
        path = pairs(tmp_path / "a", 20, lambda number: image(number + shift))  # noqa: B023
        files = MediaFiles(train=[path], valid=[path])
        write_media_source(out, "a", files, tokenizer_path, token="<image>")
        hashes.append(Catalogue.open([out]).fingerprint())
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.timeout(60)
def test_a_name_that_leads_to_no_plain_file_is_a_bad_image(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(image(1))
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(bytes(2000))
    (tmp_path / "folder.png").mkdir()
    names = ["good.png", "a\0b.png", "loop.png", "pipe.png", "large.png", "folder.png", f"{300 * 'x'}.png"]
    path = write_lines(tmp_path / "a.jsonl", [{"image": name, "caption": "a"} for name in names])
    files = MediaFiles(train=[path], valid=[path], max_bad_share=0.9, limits=ImageLimits(max_bytes=1000))
    count = write_media_source(tmp_path / "data", "web", files, tokenizer_path, token="<image>")
    told = ("leads to no file", "", "no regular file", "2,000 bytes, more than 1,000", "no regular file", "too long")
    reasons = [one["reason"] for one in count.bad.listed[:6]]
    assert [part for part, reason in zip(told, reasons, strict=True) if part not in reason] == []
    listed = [json.loads(line)["image"] for line in (tmp_path / "data/web/bad_images.jsonl").read_text().splitlines()]
    assert listed == names[1:] * 2
