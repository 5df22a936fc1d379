"""A short fuzz, poisoned files before every reader, and rot; `make fuzz` is the long one. One world for all of them."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.fuzz.__main__ import fuzz, try_case
from tests.fuzz.cases import ALL, KINDS, Case
from tests.fuzz.damage import MARKER, PICKLE, Damage
from tests.fuzz.forked import REFUSED, Ended, run_forked, verdict
from tests.fuzz.rot import FORMATS, look
from tests.fuzz.worlds import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_malformed_input_of_every_kind_ends_in_two_lines(world: Path) -> None:
    tally = fuzz(world, number=18, count=5 * len(ALL))
    assert tally.faults == {}, "\n".join(str(faults[0]) for faults in tally.faults.values())
    assert sum(count for (_, how), count in tally.count.items() if how == REFUSED) > len(ALL)


def _die() -> int:
    raise ValueError("not as promised")


def _write_and_refuse() -> int:
    Path("made").write_text("x")
    return _two_lines()


def _two_lines() -> int:
    import sys

    sys.stderr.write("a cause\na cure\n")
    return 2


def _hang() -> int:
    while True:
        pass


def test_the_fuzz_sees_tracebacks_hangs_and_files_that_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.forked.SECONDS", 1)
    for main, said in ((_die, "ValueError"), (_write_and_refuse, "wrote made"), (_hang, "did not end"),
                       (lambda: 3, "exit status 3"), (lambda: 2, "0 lines")):  # fmt: skip
        how, why = verdict(run_forked(main, tmp_path))
        assert how == "fault" and said in why, why
        (tmp_path / "made").unlink(missing_ok=True)
    assert verdict(run_forked(_two_lines, tmp_path)) == (REFUSED, "a cause a cure")


def _unpickle() -> int:
    import pickle

    pickle.loads(PICKLE)
    return 0


def test_no_reader_unpickles(world: Path, tmp_path: Path) -> None:
    """In place of each file of each format, by its ending, and beside it under the names that pickles have."""
    assert MARKER in run_forked(_unpickle, tmp_path).wrote
    for kind, row in KINDS.items():
        files = sorted(path.relative_to(world).as_posix() for path in world.glob(row.files) if path.is_file())
        by_suffix = {Path(name).suffix: name for name in files}
        for command in row.commands:
            for name in by_suffix.values():
                case = Case(kind, command[0], command[1:], row.needs, row.statuses, (Damage(name, "pickle"),))
                _unharmed(try_case(case, world), case)


def _unharmed(ended: Ended, case: Case) -> None:
    assert MARKER not in ended.wrote, case.describe()
    assert verdict(ended, (0, 1, 2))[0] != "fault", (case.describe(), ended)


def test_a_tar_brings_no_pickle_and_no_path(world: Path, tmp_path: Path) -> None:
    from tests.media.conftest import image

    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name, data in {
            "1.png": image(1), "1.txt": b"one", "1.pickle": PICKLE, "1.pth": PICKLE, "2.png": image(2), "2.txt": b"two",
            "../../3.png": image(3), "../../3.txt": b"three", "/tmp/gpt4moe-evil.png": image(4),
            "/tmp/gpt4moe-evil.txt": b"four",
        }.items():  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    words = (
        "--tokenizer", str(world / "tokenizer.json"), "--out", "inner/out", "--source", f"a={tmp_path / 'evil.tar'}",
        "--held-out", "0.5", "--bad-rows", "skip",
    )  # fmt: skip
    ended = try_case(Case("image", "prepare_media", words), world)
    assert all(name == "inner" or name.startswith("inner/") for name in ended.wrote), ended.wrote
    assert not Path("/tmp/gpt4moe-evil.png").exists() and MARKER not in ended.wrote


@pytest.mark.parametrize("name", [
    "$(touch made)", "../x", "a/b", "a\nb", "-rf", "", " ", "x" * 200, "`touch made`", "..", ".hidden", "a b", "é",
    "a;b",
])  # fmt: skip
def test_a_run_name_that_is_no_plain_word_makes_nothing(world: Path, name: str) -> None:
    import subprocess

    from tests.fuzz.worlds import SMALL

    ended = try_case(Case("configuration", "train", (*SMALL, f"run.name='{name}'"), ("data",)), world)
    assert verdict(ended)[0] == REFUSED, ended
    root = Path(__file__).resolve().parents[2]
    before = sorted(root.iterdir())
    script = subprocess.run(
        ["bash", "slurm/train.sh", "--nodes=1", f"run.name={name}"], cwd=root, capture_output=True, text=True
    )
    assert script.returncode == 2 and "run.name" in script.stderr and sorted(root.iterdir()) == before


def test_rot_is_found_before_use_and_the_file_is_named(world: Path) -> None:
    result = look(world, places=1, number=18, formats=tuple(row for row in FORMATS if row.has_hashes))
    assert result.missed == []
