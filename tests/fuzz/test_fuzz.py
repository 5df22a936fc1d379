"""A short fuzz, poisoned files before every command, and rot; `make fuzz` is the long one. One world for all of them.

Many small tests: on a slow machine each has its own limit of time.
"""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.fuzz.__main__ import fuzz, poisoned, try_case
from tests.fuzz.cases import ALL, KINDS, Case
from tests.fuzz.damage import MARKER, PICKLE
from tests.fuzz.forked import REFUSED, run_forked, verdict
from tests.fuzz.rot import FORMATS, Format, look
from tests.fuzz.worlds import make_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", ALL)
def test_malformed_input_of_every_kind_ends_in_two_lines(world: Path, kind: str) -> None:
    tally = fuzz(world, number=18, count=3, kinds=[kind])
    assert tally.faults == {}, "\n".join(str(faults[0]) for faults in tally.faults.values())
    assert tally.count.total() > 0


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


def test_a_pickle_that_is_read_would_be_seen(tmp_path: Path) -> None:
    assert MARKER in run_forked(_unpickle, tmp_path).wrote


@pytest.mark.parametrize("kind", KINDS)
def test_no_command_unpickles(world: Path, kind: str) -> None:
    """In place of files of each ending; `make fuzz` tries each ending before each command."""
    assert poisoned(world, kind, is_every=False) == []


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
def test_a_run_name_that_is_no_plain_word_makes_nothing(world: Path, tmp_path: Path, name: str) -> None:
    from tests.fuzz.worlds import SMALL

    ended = try_case(Case("configuration", "train", (*SMALL, f"run.name='{name}'"), ("data",)), world)
    assert verdict(ended)[0] == REFUSED, ended
    answer = _train_script(tmp_path, f"run.name={name}")
    assert answer.returncode == 2 and "run.name" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]


def test_a_run_that_has_a_folder_goes_on_in_the_script_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "runs" / "my run").mkdir(parents=True)
    (tmp_path / "runs" / "my run" / "resolved.yaml").touch()
    assert "cannot name a folder" not in _train_script(tmp_path, "run.name=my run", "--chain=x").stderr
    for name in ("runs/my run", "../runs/my run", "your run"):
        assert "cannot name a folder" in _train_script(tmp_path, f"run.name={name}", "--chain=x").stderr


def _train_script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """slurm/train.sh in a copy: what is made in the checkout meanwhile is none of its doing."""
    shutil.copytree(ROOT / "slurm", folder / "slurm", dirs_exist_ok=True)
    return subprocess.run(["bash", "slurm/train.sh", "--nodes=1", *words], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_rot_is_found_before_use_and_the_file_is_named(world: Path, row: Format) -> None:
    result = look(world, places=1, number=18, formats=(row,), most=2)
    assert result.missed == [] and result.found.total() > 0
