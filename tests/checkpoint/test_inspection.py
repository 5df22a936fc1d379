"""tools/inspect_checkpoint.py: what it says, as people and as JSON, and its exit status."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt4moe.checkpoint import index
from gpt4moe.checkpoint.health import mark
from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.checkpoint.retention import step_folder
from tests.checkpoint.builders import dealt, flip_bit, state, write_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the tool in this process: (exit status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = module.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20, differently cut; 30 was never committed."""
    folder = tmp_path / "runs" / "first"
    for step, world_size in ((10, 3), (20, 1)):
        hands = dealt(state(step), world_size, seed=step)
        changes = {"step": step, "layout": f"{world_size} ranks", "consumed_samples": 8 * step}
        write_checkpoint(step_folder(folder / "checkpoints", step), hands, block_bytes=64, **changes)
    step_folder(folder / "checkpoints", 30).mkdir()
    return folder


def damage_data(run_folder: Path) -> None:
    """So that any look at a weight or a header would fail."""
    for file in run_folder.rglob("*.safetensors"):
        file.write_bytes(b"x" * file.stat().st_size)


def test_ls_says_what_there_is_without_looking_into_files(inspect: Any, run_folder: Path) -> None:
    damage_data(run_folder)
    status, out, _ = inspect("ls", run_folder)
    assert status == 0
    head, *rows = [line.split() for line in out.splitlines()]
    assert head == ["STEP", "SAVED", "SUSPECT", "SIZE", "FILES", "SAMPLES", "LAYOUT"]
    assert [(row[0], row[-2:]) for row in rows[:2]] == [("10", ["3", "ranks"]), ("20", ["1", "ranks"])]
    assert rows[2] == ["30", "uncommitted"]


def test_ls_and_show_say_which_checkpoint_is_suspect_and_why(inspect: Any, run_folder: Path) -> None:
    mark(step_folder(run_folder / "checkpoints", 20), "step 17 was a spike")
    _, out, _ = inspect("ls", run_folder)
    assert [line.split()[2] for line in out.splitlines()[1:3]] == ["no", "yes"]
    assert out.splitlines()[-1] == "step 20 is suspect: step 17 was a spike"
    assert "suspect     step 17 was a spike" in inspect("show", run_folder)[1]
    assert inspect("verify", run_folder)[0] == 0


def test_ls_names_a_damaged_manifest(inspect: Any, run_folder: Path) -> None:
    flip_bit(step_folder(run_folder / "checkpoints", 10) / NAME, 200)
    _, out, _ = inspect("ls", run_folder / "checkpoints", "--json")
    assert [row["state"] for row in json.loads(out)["checkpoints"]] == ["damaged", "committed", "uncommitted"]


def test_show_means_the_latest_of_a_run_folder_and_reads_no_weights(inspect: Any, run_folder: Path) -> None:
    damage_data(run_folder)
    status, out, _ = inspect("show", run_folder)
    assert status == 0
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown["step"] == "20"
    assert shown["samples"] == "160 (books 20, code 4)"


def test_show_lists_tensors_with_shapes_and_slices(inspect: Any, run_folder: Path) -> None:
    status, out, _ = inspect("show", run_folder, "--tensors", "--json")
    answer = json.loads(out)
    assert status == 0 and answer["step"] == 20
    assert {name: tuple(entry["shape"]) for name, entry in answer["tensors"].items()} == {
        name: array.shape for name, array in state().items()
    }
    assert answer["tensors"]["weight/c.norm"]["slices"] > 1
    assert "weight/c.norm" in inspect("show", run_folder, "--tensors")[1]


def test_verify_says_that_a_good_one_is_whole(inspect: Any, run_folder: Path) -> None:
    status, out, _ = inspect("verify", run_folder)
    assert status == 0
    assert "is whole: 9 tensors in " in out
    assert json.loads(inspect("verify", run_folder, "--json")[1])["problems"] == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 3))
def test_verify_finds_any_flipped_bit(inspect: Any, run_folder: Path, place: float, bit: int, which: int) -> None:
    folder = step_folder(run_folder / "checkpoints", 10)
    file = sorted(folder.iterdir())[which]
    before = file.read_bytes()
    changed = bytearray(before)
    changed[int(place * len(before))] ^= 1 << bit
    try:
        file.write_bytes(changed)
        status, out, _ = inspect("verify", folder)
    finally:
        file.write_bytes(before)
    assert status == 1
    assert "is damaged:" in out and file.name in out


def test_verify_lists_every_damaged_block(inspect: Any, run_folder: Path) -> None:
    file = step_folder(run_folder / "checkpoints", 20) / "rank-00000.safetensors"
    flip_bit(file, -1)
    flip_bit(file, -200)
    assert len(json.loads(inspect("verify", run_folder, "--json")[1])["problems"]) == 2


@pytest.mark.parametrize(
    ("change", "said"), [("missing", "elements are missing"), ("doubled", "overlap"), ("whole", "the whole tensor")]
)
def test_verify_finds_missing_and_doubled_slices(inspect: Any, tmp_path: Path, change: str, said: str) -> None:
    hands = dealt(state(), 2)
    victim = hands[0][3]
    if change == "missing":
        hands[0].remove(victim)
    elif change == "doubled":
        hands[1].append(victim)
    else:
        hands = [[piece for piece in hand if piece.tensor != victim.tensor] for hand in hands]
    write_checkpoint(tmp_path / "x", hands)
    status, out, _ = inspect("verify", tmp_path / "x")
    assert status == 1
    assert said in out and victim.tensor in out


def test_a_missing_file_is_a_failed_check_and_no_checkpoint_is_bad_input(inspect: Any, run_folder: Path) -> None:
    (step_folder(run_folder / "checkpoints", 20) / "rank-00000.safetensors").unlink()
    status, out, err = inspect("verify", run_folder)
    assert (status, err) == (1, "") and "is missing" in out
    for command in ("ls", "show", "verify"):
        status, out, err = inspect(command, run_folder / "nothing")
        assert (status, out) == (2, "") and len(err.splitlines()) == 2


def test_diff_finds_the_same_tensors_in_other_slices_equal(inspect: Any, tmp_path: Path) -> None:
    for name, world_size in (("a", 1), ("b", 3)):
        write_checkpoint(tmp_path / name, dealt(state(), world_size, seed=world_size), block_bytes=64)
    status, out, _ = inspect("diff", tmp_path / "a", tmp_path / "b")
    assert (status, out) == (0, "0 of 9 tensors differ.\n")


@pytest.mark.parametrize("run_elements", [3, 10**6])
def test_diff_says_which_tensors_differ_and_by_how_much(
    inspect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_elements: int
) -> None:
    monkeypatch.setattr(index, "RUN_ELEMENTS", run_elements)
    before, after = state(), state()
    after["exp_avg/a.weight"][2, 3] += 0.5
    after["exp_avg/a.weight"][6, 0] -= 0.25
    for name, arrays, seed in (("a", before, 1), ("b", after, 2)):
        write_checkpoint(tmp_path / name, dealt(arrays, 2, seed=seed))
    status, out, _ = inspect("diff", tmp_path / "a", tmp_path / "b", "--json")
    (row,) = json.loads(out)["different"]
    assert status == 1
    assert (row["tensor"], row["elements"], row["of"]) == ("exp_avg/a.weight", 2, 35)
    assert row["max_abs"] == pytest.approx(0.5, rel=1e-6)
    norm = np.linalg.norm(before["exp_avg/a.weight"])
    assert row["relative"] == pytest.approx((0.5**2 + 0.25**2) ** 0.5 / norm, rel=1e-5)
    assert inspect("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "0.6")[0] == 0
    assert inspect("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "0.4")[0] == 1
    assert "2 of 35" in inspect("diff", tmp_path / "a", tmp_path / "b")[1]


@pytest.mark.parametrize("text", ["nan", "-1", "small"])
def test_a_tolerance_that_is_none_is_refused(text: str, inspect: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        inspect("diff", tmp_path, tmp_path, f"--tolerance={text}")
    assert ended.value.code == 2


def test_diff_compares_bits_and_a_nan_is_never_within_tolerance(inspect: Any, tmp_path: Path) -> None:
    before, after = state(), state()
    before["weight/c.norm"][0] = after["weight/c.norm"][0] = np.nan
    after["weight/c.norm"][1] = np.nan
    before["weight/a.weight"][0, 0], after["weight/a.weight"][0, 0] = 0.0, -0.0
    for name, arrays in (("a", before), ("b", after)):
        write_checkpoint(tmp_path / name, dealt(arrays, 1))
    status, out, _ = inspect("diff", tmp_path / "a", tmp_path / "b", "--json")
    rows = {row["tensor"]: (row["elements"], row["max_abs"]) for row in json.loads(out)["different"]}
    assert rows == {"weight/c.norm": (1, None), "weight/a.weight": (1, 0.0)}
    status, out, _ = inspect("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "1")
    assert status == 1 and "not finite" in out and "1 of 9 tensors differ" in out


def test_diff_names_tensors_of_one_side_and_other_shapes(inspect: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", dealt(state(shapes={"x": (4,), "y": (2,)}), 1))
    write_checkpoint(tmp_path / "b", dealt(state(shapes={"x": (5,), "z": (2,)}), 1))
    status, out, _ = inspect("diff", tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert f"only in {tmp_path / 'a'}: weight/y" in out and f"only in {tmp_path / 'b'}: weight/z" in out
    assert "weight/x: shape [4] and [5]" in out


def test_diff_of_a_damaged_one_is_bad_input(inspect: Any, run_folder: Path) -> None:
    file = step_folder(run_folder / "checkpoints", 20) / "rank-00000.safetensors"
    flip_bit(file, -1)
    status, out, err = inspect("diff", step_folder(run_folder / "checkpoints", 10), run_folder)
    assert (status, out) == (2, "") and "is damaged" in err


def test_no_command_loads_torch(run_folder: Path) -> None:
    calls = [["ls", run_folder], ["show", run_folder, "--tensors"], ["verify", run_folder]]
    calls.append(["diff", run_folder, run_folder])
    code = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import inspect_checkpoint\n"
        f"for call in {[[str(part) for part in call] for call in calls]}: assert inspect_checkpoint.main(call) == 0\n"
        "assert not {'torch', 'megatron', 'deepspeed'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_has_examples_and_bad_arguments_are_bad_input() -> None:
    shown = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, check=True).stdout
    assert "python tools/inspect_checkpoint.py verify runs/first" in shown
    assert subprocess.run([sys.executable, TOOL, "verfy", "x"], capture_output=True, check=False).returncode == 2


def test_sizes_are_said_for_people() -> None:
    from gpt4moe.checkpoint.inspection_text import size

    assert [size(n) for n in (0, 1, 999, 1000, 1.5e9, 2.16e13, 9e15)] == [
        "0 B", "1 B", "999 B", "1 kB", "1.5 GB", "21.6 TB", "9e+03 TB"
    ]  # fmt: skip
