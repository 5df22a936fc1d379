"""The demo's data folder: real text, no copies, held out by content, whole or not there, used again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import check_data
from gpt4moe.data.manifest import SPLITS
from gpt4moe.data.mixture import Phase
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.demo.corpus import build_demo_corpus, main, normalised, split
from gpt4moe.demo.entropy import _count, bigram_cross_entropy, corpus_entropies, unigram_cross_entropy
from gpt4moe.demo.sources import Document, package_docstrings, prose_sources, python_sources
from tests.data.conftest import shard


def document(path: str, text: str) -> Document:
    return Document(path=path, text=text, licence="CC0-1.0")


def many(word: str, count: int = 80) -> Iterator[Document]:
    for i in range(count):
        yield document(f"{word}/{i:03}", f"{word} number {i} has {i * i} of its own words. " * 8 + "\n")


SOURCES = {"code": lambda: many("code"), "prose": lambda: many("prose", 40)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder of invented text. Do not write into it."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo_corpus(folder, vocab_size=300, sources=SOURCES)
    return folder


def test_a_run_accepts_the_folder(built: Path) -> None:
    sizes = ["model.vocab_size=300", "model.seq_length=32"]
    check_data(load_run_config(["+experiment=tiny", "run.name=t", f"data.path={built}", *sizes]))


def test_every_document_is_listed_with_origin_licence_hash_and_side(built: Path) -> None:
    listing = json.loads((built / "corpus.json").read_text())
    assert len(listing) == 120
    assert set(listing[0]) == {"source", "path", "licence", "sha256", "bytes", "split"}
    for name, source in Catalogue.open([built]).sources.items():
        for side in SPLITS:
            listed = [entry for entry in listing if (entry["source"], entry["split"]) == (name, side)]
            assert len(listed) == source.manifest.num_documents(side)


def test_no_document_is_on_both_sides(built: Path) -> None:
    train, valid = (
        {tokens.document(i).tobytes() for i in range(tokens.num_documents)}
        for tokens in (shard(built, "code", side) for side in SPLITS)
    )
    assert train
    assert valid
    assert not train & valid


def test_the_text_comes_back_from_the_tokens(built: Path) -> None:
    tokenizer = load_tokenizer(built / "tokenizer.json")
    texts = {item.text.strip() for item in many("prose", 40)}
    tokens = shard(built, "prose", "train")
    assert all(tokenizer.decode(tokens.document(i)[:-1].tolist()).strip() in texts for i in range(tokens.num_documents))


def test_building_again_reuses_what_is_there(built: Path) -> None:
    def unread() -> Iterator[Document]:
        raise AssertionError("the sources were read again")

    before = (built / "manifest.json").stat().st_mtime_ns
    build_demo_corpus(built, vocab_size=300, sources={"code": unread})
    assert (built / "manifest.json").stat().st_mtime_ns == before


def test_two_builds_are_byte_for_byte_the_same(built: Path, tmp_path: Path) -> None:
    build_demo_corpus(tmp_path, vocab_size=300, sources=SOURCES)
    one, other = (Catalogue.open([folder]) for folder in (tmp_path, built))
    assert one.vocabulary == other.vocabulary
    assert {name: source.manifest for name, source in one.sources.items()} == {
        name: source.manifest for name, source in other.sources.items()
    }


def test_another_vocabulary_builds_anew(tmp_path: Path) -> None:
    for vocab_size in (280, 300):
        made = build_demo_corpus(tmp_path, vocab_size=vocab_size, sources=SOURCES)
        assert made.vocabulary.vocab_size == vocab_size


@pytest.mark.parametrize(
    "name", ["code/train-00000.bin", "prose/valid-00000.idx", "code/manifest.json", "tokenizer.json", "manifest.json"]
)
def test_a_folder_that_lost_a_file_is_made_anew(built: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "demo"))
    (folder / name).unlink()
    build_demo_corpus(folder, vocab_size=300, sources=SOURCES)
    assert (folder / name).read_bytes() == (built / name).read_bytes()


def test_a_vocabulary_too_small_exits_2_with_cause_and_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--vocab-size", "100"]) == 2
    assert "below 257" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


def test_copies_that_differ_only_in_spaces_at_line_ends_are_dropped() -> None:
    text = "line of text\n" * 40
    entries = split([document("b", text.replace("\n", "  \r\n")), document("a", text), document("c", "short\n")])
    assert [entry.document.path for entry in entries] == ["a"]


def test_the_held_out_share_is_never_overshot_by_a_large_document() -> None:
    documents = [document(str(i), f"{i} " * (100 + 4000 * (i % 10 == 0))) for i in range(100)]
    entries = split(documents, held_out_share=0.03)
    sizes = {held: sum(len(e.document.text) for e in entries if e.held_out is held) for held in (True, False)}
    assert 0.02 < sizes[True] / sum(sizes.values()) <= 0.03


def test_a_documents_side_does_not_depend_on_where_it_was_found() -> None:
    here, there = (split([document(f"{root}{i}", f"{i} text " * 50) for i in range(200)]) for root in ("a/", "z/"))
    assert {e.sha256 for e in here if e.held_out} == {e.sha256 for e in there if e.held_out}


def test_normalising_twice_changes_nothing() -> None:
    text = "\r\n a\t \r\nb\rc  \n\n"
    assert normalised(text) == normalised(normalised(text)) == " a\nb\nc\n"


def test_the_standard_library_alone_gives_both_sources() -> None:
    sources = python_sources()
    assert {next(sources).licence for _ in range(3)} == {"PSF-2.0"}
    topic = next(iter(prose_sources()))
    assert topic.path.startswith("pydoc/")
    assert len(topic.text) > 100


def test_other_peoples_packages_and_undecodable_files_are_left_out(tmp_path: Path) -> None:
    for name in ("os.py", "json/decoder.py", "site-packages/theirs.py", "ensurepip/x.py", "pydoc_data/topics.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("é = 1".encode("latin-1"))
    assert [found.path for found in python_sources(tmp_path)] == ["python/json/decoder.py", "python/os.py"]


def test_docstrings_of_packages_become_text_with_their_licence(tmp_path: Path) -> None:
    long = "What it does, in words. " * 10
    source = f'''def f(x):
    """{long}

    Args:
        x: a number.
    """
    return """not this: it follows no colon, however long it is, {long}"""


class C:
    r"""Another: {long}"""

    def short(self):
        """Too short."""
'''
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "a.py").write_text(source)
    (tmp_path / "nobody_s.py").write_text(source)
    (tmp_path / "numpy" / "latin.py").write_bytes(source.encode() + "é".encode("latin-1"))
    found = {document.path: document for document in package_docstrings(tmp_path)}
    assert found.keys() == {"packages/numpy/a.py", "packages/nobody_s.py"}
    text = found["packages/numpy/a.py"].text
    assert text == f"{long}\n\nArgs:\n    x: a number.\n\nAnother: {long}"
    assert "BSD" in found["packages/numpy/a.py"].licence and found["packages/nobody_s.py"].licence == "unknown"


def test_entropies_are_those_of_the_definition() -> None:
    """Against loops over Chen and Goodman's formula, on a chain small enough to enumerate."""
    generator = np.random.default_rng(0)
    train, held_out = generator.choice(5, 60, p=[0.5, 0.3, 0.1, 0.1, 0]), np.array([0, 1, 4, 2, 0, 0, 3])
    pairs = list(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    kinds = set(pairs)
    once, twice = (sum(pairs.count(pair) == times for pair in kinds) for times in (1, 2))
    discount = once / (once + 2 * twice)

    def probability(a: int, b: int) -> float:
        lower = (len({x for x, y in kinds if y == b}) + 1) / (len(kinds) + 5)
        total = sum(first == a for first, _ in pairs)
        if not total:
            return lower
        followers = len({y for x, y in kinds if x == a})
        return max(pairs.count((a, b)) - discount, 0) / total + discount * followers / total * lower

    counts = _count([train], 5)
    assert all(sum(probability(a, b) for b in range(5)) == pytest.approx(1.0) for a in range(5))
    steps = zip(held_out[:-1].tolist(), held_out[1:].tolist(), strict=True)
    bigram = -np.mean([np.log(probability(a, b)) for a, b in steps])
    unigram = -np.mean([np.log(((train == b).sum() + 1) / 65) for b in held_out[1:]])
    assert bigram_cross_entropy(held_out, counts) == pytest.approx(bigram, rel=1e-12)
    assert unigram_cross_entropy(held_out, counts) == pytest.approx(unigram, rel=1e-12)


def test_entropies_are_kept_and_computed_anew_for_other_weights(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue.open([built])
    pooled = [Phase(0, {"code": 0.5, "prose": 0.5})], [Phase(0, {"code": 1.0})]
    both, code = (corpus_entropies(catalogue, phases) for phases in pooled)
    assert both.bigram < both.unigram
    assert code != both
    monkeypatch.setattr("gpt4moe.demo.entropy._count", None)
    assert corpus_entropies(catalogue, pooled[1]) == code
