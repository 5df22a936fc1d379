"""Every form of the same documents gives the same tokens; trees skip what is no text, and say so."""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt4moe.corpus.inputs import cut, find_inputs
from gpt4moe.corpus.records import Notes, place_of, read_part
from gpt4moe.data.manifest import SourceManifest
from gpt4moe.data.tokenizer import load_tokenizer
from tests.corpus.conftest import TEXTS, tokens_of, write_lines

Make = Callable[..., int]


def test_the_same_documents_as_jsonl_gzip_zstd_and_parquet_give_the_same_tokens(make: Make, tmp_path: Path) -> None:
    pa, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    import pyarrow.parquet as pq

    plain = write_lines(tmp_path / "a.jsonl", TEXTS).read_bytes()
    half = plain.index(b"\n", len(plain) // 2) + 1
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(plain[:half]) + pack(plain[half:]))
    pq.write_table(pa.table({"id": range(len(TEXTS)), "body": TEXTS}), tmp_path / "a.parquet", row_group_size=70)
    kinds = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
    for kind in kinds:
        field = "body" if kind == "parquet" else "text"
        assert make(f"--source={kind}={tmp_path}/a.{kind}", "--held-out=0.1", f"--field={field}") == 0
    sources = [tmp_path / "out" / kind for kind in kinds]
    for split in ("train", "valid"):
        assert len({tokens_of(source, split) for source in sources}) == 1


def test_a_damaged_zstd_file_is_found_though_its_last_frame_is_cut(make: Make, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(write_lines(tmp_path / "a.jsonl", TEXTS).read_bytes())
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-20])
    assert make(f"--source=a={tmp_path}/a.jsonl.zst") == 2


@pytest.mark.parametrize("piece_bytes", [1, 37, 100, 10**6])
def test_a_file_cut_anywhere_gives_each_line_once(tmp_path: Path, piece_bytes: int) -> None:
    texts = ["first", "", "third\n\nwith lines", "ümläut" * 9, "last"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join([lines[0], "", *lines[1:]]).encode())
    read = [
        (text, place_of(part, place))
        for piece in cut(find_inputs("a", [str(path)]), piece_bytes)
        for part in piece
        for text, _, place in read_part(part, "text", lambda amount: None, Notes())
    ]
    assert read == [(text, f"{path}:{number}") for text, number in zip(texts, (1, 3, 4, 5, 6), strict=True)]


def test_a_tree_s_text_files_are_documents_and_the_others_are_counted(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    (tree / "b" / ".git").mkdir(parents=True)
    (tree / "b" / ".git" / "config.py").write_text("no")
    for number in range(40):
        (tree / "b" / f"{number}.py").write_text(f"x = {number}\n" * 5)
    (tree / "a.c").write_text("int main(void);\n")
    (tree / "binary.h").write_bytes(b"a\0b")
    (tree / "latin.txt").write_bytes(b"\xe4")
    (tree / "picture.png").write_bytes(b"png")
    (tree / "rows.jsonl").write_text("{}\n")
    (tree / ".hidden.py").write_text("no")
    (tree / "link.py").symlink_to(tree / "a.c")
    assert make(f"--source=code={tree}", "--held-out=0.3") == 2
    assert "1 files of records" in capsys.readouterr().err
    assert make(f"--source=code={tree}", "--held-out=0.3", "--tree=code") == 0
    text = SourceManifest.read(tmp_path / "out" / "code").text
    assert text is not None and sum(text["documents"].values()) == 41
    assert text["files_skipped"] == {
        "binary": 1, "hidden": 2, "link": 1, "not UTF-8": 1, "other suffix": 1, "records in a tree": 1,
    }  # fmt: skip
    assert text["inputs"][0]["files"] == 41


def test_a_folder_of_records_alone_is_read_as_records(make: Make, tmp_path: Path) -> None:
    """As datatrove's JsonlWriter names them: rank.jsonl.gz."""
    (tmp_path / "data").mkdir()
    for rank in range(3):
        with gzip.open(tmp_path / "data" / f"0000{rank}.jsonl.gz", "wt") as stream:
            for text in TEXTS[rank::3]:
                stream.write(json.dumps({"text": text, "id": "1", "metadata": {"language": "en"}}) + "\n")
    assert make(f"--source=web={tmp_path}/data", "--held-out=0.1") == 0
    text = SourceManifest.read(tmp_path / "out" / "web").text
    assert text is not None and sum(text["documents"].values()) == len(TEXTS) and len(text["inputs"]) == 3


# What JsonlWriter of datatrove 0.10.1 wrote as rank 0 and rank 13 for four documents, the third of them without a text.
OF_DATATROVE = {
    "00000.jsonl.gz":
        "H4sICAY/DmsC/zAwMDAwLmpzb25sAF2Pz0rEMBDG7z5FmPNu2lSQNSyC4M2jnkphyaazbSBNSzqhq2XBN/GyBx/CW9/EJ3FW0INz"
        "mX+/+fhmBsIjgYYHjOJxOR84+eWcDiSWzz03tUPxRNEs7yirUE7oCEWJzqP4evsQnSNRAfe2xVCBhBW4muW2KQadkqu1uuNZh2Rq"
        "Qwb0DCl6BlqiYdRZhkfTDR6l7btMMckU8rrIi5u1Kta5es6vdbHRqih5601okmlwN9o+MpfL280KDuxmNxhq+dBGM/ksv4ScTLSy"
        "eYXT6Wr+/fNejGj7UIuBZf7s7uGC/JTYDfTyz3IArVjkG9W/FF8tAQAA",
    "00013.jsonl.gz":
        "H4sICAY/DmsC/zAwMDEzLmpzb25sAKtWKkmtKFGyUspPU0jMyy/JSC1SKEkszlbSUcpMAQonAxm5qSWJKYkliUpW1Uo5iXnpSlbR"
        "SimpSjp5pTk5sbW1XAClna6KRAAAAA==",
}  # fmt: skip


def test_files_of_datatrove_are_read_as_it_writes_them(make: Make, tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    for name, content in OF_DATATROVE.items():
        (tmp_path / "clean" / name).write_bytes(base64.b64decode(content))
    other = write_lines(tmp_path / "other.jsonl", TEXTS)  # of a split that has none of them
    assert make(f"--source=web={tmp_path}/clean,{other}", "--held-out=0.1") == 0
    text = SourceManifest.read(tmp_path / "out" / "web").text
    assert text is not None and text["removed"]["empty"] == 1
    assert sum(text["documents"].values()) == 3 + len(TEXTS)
    found = load_tokenizer(tokenizer_path).decode(np.concatenate([
        np.frombuffer(tokens_of(tmp_path / "out" / "web", split), dtype="<u2") for split in ("train", "valid")
    ]).tolist())  # fmt: skip
    for written in (
        'Der Käfer läuft über die Straße.\nZweite Zeile \u2028 mit "Zeichen".',
        "A second page.",
        "of another",
    ):
        assert written in found


def test_a_byte_order_mark_is_no_text_but_counts_in_the_sum_of_the_file(make: Make, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes((b"\xef\xbb\xbf" if number == 5 else b"") + text.encode())
    assert make(f"--source=a={tmp_path}/*.txt", "--held-out=0.1") == 0
    manifest = SourceManifest.read(tmp_path / "out" / "a").text
    assert manifest is not None and sum(manifest["bytes_read"].values()) == sum(len(text.encode()) for text in TEXTS)
    for one in manifest["inputs"]:
        assert one["sha256"] == hashlib.sha256(Path(one["path"]).read_bytes()).hexdigest()


def test_a_parquet_file_with_two_columns_of_the_name_is_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    assert make(f"--source=a={tmp_path}/a.parquet") == 2
    assert "has 2 columns 'text'" in capsys.readouterr().err
