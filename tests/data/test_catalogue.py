"""Sources lie beside each other: one is added, replaced or removed without a look at the others; folders are joined."""

import shutil
from pathlib import Path

import pytest

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import check_data
from gpt4moe.data.loader import build_data
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import Tokenizer, train_tokenizer
from gpt4moe.errors import DataError
from tests.data.conftest import make_folder, small_run


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", tokenizer)


def texts(word: str, count: int = 40) -> SourceText:
    documents = [f"{word} {i} and {i * i} other things\n" for i in range(count)]
    return SourceText(train=documents, valid=documents[:6], licence="CC0-1.0", description=word)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_source_touches_no_other(folder: Path) -> None:
    before = written(folder)
    write_data_folder(folder, {"gamma": texts("thing")}, folder / "tokenizer.json", lambda amount: None)
    after = written(folder)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {"gamma"}
    assert list(Catalogue.open([folder]).sources) == ["alpha", "beta", "gamma"]


def test_a_source_is_replaced_whole(folder: Path) -> None:
    write_data_folder(folder, {"beta": texts("thing", 7)}, folder / "tokenizer.json", lambda amount: None)
    sources = Catalogue.open([folder]).sources
    assert sources["beta"].manifest.num_documents("train") == 7
    assert sorted(path.name for path in folder.iterdir()) == ["alpha", "beta", "manifest.json", "tokenizer.json"]


def test_a_source_that_fails_leaves_the_older_one(folder: Path) -> None:
    before = written(folder)
    nothing = SourceText(train=["text\n"], valid=[], licence="", description="")
    with pytest.raises(DataError, match="no document for valid"):
        write_data_folder(folder, {"beta": nothing}, folder / "tokenizer.json", lambda amount: None)
    assert written(folder) == before


def test_a_source_that_is_being_written_is_no_source(folder: Path) -> None:
    shutil.copytree(folder / "alpha", folder / ".gamma-x" / "new")
    (folder / "delta").mkdir()
    assert list(Catalogue.open([folder]).sources) == ["alpha", "beta"]


def test_shards_without_their_manifest_are_refused(folder: Path) -> None:
    (folder / "beta" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"beta has shards of a source, and no manifest\.json"):
        check_data(small_run(folder))


def test_another_tokenizer_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    train_tokenizer([f"other {i} words\n" for i in range(99)], vocab_size=280).backend.save(str(other))
    before = written(folder)
    with pytest.raises(DataError, match="another tokenizer") as refusal:
        write_data_folder(folder, {"gamma": texts("thing")}, other, lambda amount: None)
    assert str(folder / "tokenizer.json") in refusal.value.cure
    assert written(folder) == before


def test_a_source_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer([f"other {i} words\n" for i in range(99)], vocab_size=280).backend.save(str(other / "t.json"))
    write_data_folder(other, {"gamma": texts("thing")}, other / "t.json", lambda amount: None)
    shutil.copytree(other / "gamma", folder / "gamma")
    with pytest.raises(DataError, match=r"gamma were made by another tokenizer"):
        check_data(small_run(folder))
    with pytest.raises(DataError, match=r"other were made by another tokenizer"):
        check_data(small_run(None, "data=demo", f"data.path=[{folder / '..' / 'data'},{other}]"))


def test_a_run_names_sources_of_several_folders(folder: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    write_data_folder(more, {"gamma": texts("thing")}, folder / "tokenizer.json", lambda amount: None)
    joined = small_run(None, "data=demo", f"data.path=[{folder},{more}]", "+data.sources={alpha: 1, gamma: 2}")
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    shutil.copytree(more / "gamma", both / "gamma")
    one = small_run(both, "+data.sources={alpha: 1, gamma: 2}")
    assert check_data(joined).identity == check_data(one).identity
    streams = [build_data(run).train for run in (joined, one)]
    assert [streams[0].sample(n).tokens.tolist() for n in range(30)] == [
        streams[1].sample(n).tokens.tolist() for n in range(30)
    ]
    with pytest.raises(DataError, match=r"Source alpha is in .*data and in .*both"):
        check_data(small_run(None, "data=demo", f"data.path=[{folder},{both}]"))


@pytest.mark.parametrize("path", ["[]", "[a,3]", "7"])
def test_a_path_that_names_no_folder_is_refused(path: str) -> None:
    with pytest.raises(Exception, match=r"data\.path"):
        small_run(None, "data=demo", f"data.path={path}")


def test_a_folder_without_a_source_is_refused(folder: Path) -> None:
    for name in ("alpha", "beta"):
        shutil.rmtree(folder / name)
    with pytest.raises(DataError, match="there is no source"):
        check_data(small_run(folder))
