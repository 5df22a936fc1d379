"""Samples of WebDataset tars become documents; what is none is told with its key, a damaged tar by its name."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.pictures import ImageLimits
from gpt4moe.media.source import MediaFiles, write_media_source
from tests.media.conftest import documents, image, words
from tools.prepare_media import main


def tar_of(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_tars_of_webdataset(tokenizer_path: Path, tmp_path: Path, capsys: Any) -> None:
    interleaved = json.dumps({"text": "a<image>b<image>", "images": ["1.PNG", "0.png"]})
    path = tar_of(tmp_path / "a.tar", {
        "s/1.jpg": image(1, "JPEG"), "s/1.txt": "One.", "s/1.json": '{"caption": "no"}', "s/1.pickle": b"cos\nsystem\n",
        "s/2.png": image(2), "s/2.json": '{"caption": "Two.", "url": "x"}',
        "s/3.0.png": image(3), "s/3.1.PNG": image(4), "s/3.json": interleaved,
        "s/4.2.png": image(6), "s/4.10.png": image(7), "s/4.txt": "Clip.",
    })  # fmt: skip
    files = MediaFiles(train=[path], valid=[path])
    write_media_source(tmp_path / "data", "a", files, tokenizer_path, token="<image>")
    source = Catalogue.open([tmp_path / "data"]).sources["a"]
    assert documents(source, "train", tokenizer_path) == [
        ("<image>One.<|endoftext|>", [[image(1, "JPEG")]]),
        ("<image>Two.<|endoftext|>", [[image(2)]]),
        ("a<image>b<image><|endoftext|>", [[image(4)], [image(3)]]),
        ("<image>Clip.<|endoftext|>", [[image(6), image(7)]]),
    ]
    bad = tar_of(tmp_path / "bad.tar", {
        "1.jpg": image(1), "2.txt": "Two.", "3.jpg": image(1), "3.png": image(2), "3.txt": "x",
        "4.0.png": image(3), "4.1.png": image(3), "4.json": json.dumps({"text": "a<image>", "images": ["0.png"]}),
    })  # fmt: skip
    assert main(words(tokenizer_path, tmp_path / "more", bad)) == 2
    told = capsys.readouterr().err
    assert f"4 documents are none: {bad}:1: an image without a caption" in told and "2 images of one caption" in told
    assert f"{bad}:2: a sample without an image" in told and "4: an image without a tag: 1.png" in told
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[:2000])
    assert main(words(tokenizer_path, tmp_path / "more", cut)) == 2
    assert "cut.tar is no whole tar" in capsys.readouterr().err


def test_a_member_that_is_too_large_is_not_read_and_half_a_character_is_named(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, member: (read.append(member.name), extract(tar, member))[1]
    )
    path = tar_of(tmp_path / "a.tar", {
        "1.png": image(1), "1.txt": "One.", "2.png": image(2) + bytes(2000), "2.txt": "Two.", "3.png": image(3),
        "3.txt": "x" * 2000, "4.png": image(4), "4.json": '{"caption": "\\ud800"}', "4.pickle": b"cos",
    })  # fmt: skip
    files = MediaFiles(
        train=[path], valid=[path], max_bad_share=0.5, skips_bad_rows=True, limits=ImageLimits(max_bytes=1000)
    )
    count = write_media_source(tmp_path / "data", "a", files, tokenizer_path, token="<image>")
    assert sorted(set(read)) == ["1.png", "1.txt", "2.txt", "3.png", "4.json", "4.png"]
    assert count.bad.listed[0]["reason"] == f"it has {len(image(2)) + 2000:,} bytes, more than 1,000"
    assert [one["reason"] for one in count.skipped.listed[:2]] == [
        f"{path}:3: its .txt has 2,000 bytes, more than 1,000.",
        f'{path}:4: its .json has half of a surrogate pair: {{"caption": "\\ud800"}}',
    ]
