"""Bad input and bad luck: one line of cause, one of cure, exit status 2, nothing half-written; a kill is made good."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.convert import publish, safetensors_file
from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.verify import read_prompts, verify
from gpt4moe.errors import ConversionError
from tests.checkpoint.builders import flip_bit
from tests.training.command import contents

ROOT = Path(__file__).resolve().parents[2]


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def _break_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 0x80
    file.write_bytes(data)


def _claim_a_huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _break_header, _claim_a_huge_header, _empty])
def test_a_damaged_file_of_theirs_is_refused(damage: Callable[[Path], None], tmp_path: Path, mixtral: Path) -> None:
    source = shutil.copytree(mixtral, tmp_path / "hf")
    damage(source / "model.safetensors")
    with pytest.raises(ConversionError, match="truncated or no safetensors file"):
        from_huggingface(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_flipped_bit_of_ours_is_found_and_nothing_stays(tmp_path: Path, tied: Path) -> None:
    run = shutil.copytree(tied, tmp_path / "run")
    (file,) = (run / "checkpoints" / "step-00000003").glob("*.safetensors")
    flip_bit(file, file.stat().st_size // 2)
    ended = convert("to-hf", run, tmp_path / "hf")
    assert ended.returncode == 2 and ended.stdout == ""
    cause, cure = ended.stderr.splitlines()
    assert "is damaged" in cause and "another checkpoint" in cure
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_out_that_exists_is_left_alone(tmp_path: Path, tied: Path, mixtral: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("dear")
    for arguments in (("to-hf", tied), ("from-hf", mixtral), ("to-inference", tied, "--tp", 1, "--pp", 1)):
        ended = convert(arguments[0], arguments[1], tmp_path / "out", *arguments[2:])
        assert ended.returncode == 2 and "exists already" in ended.stderr
    assert contents(tmp_path) == {"out/mine": b"dear"}


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "fsync", full)
    with pytest.raises(ConversionError, match="No space left on device"):
        to_huggingface(tied, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_known_before(tmp_path: Path, tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="GB free"):
        to_huggingface(tied, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


class _Killed(BaseException):
    """Like SIGKILL: nobody cleans up."""


def test_after_a_kill_finished_files_are_not_written_again(
    tmp_path: Path, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = publish.write_stream

    def until_the_third(path: Path, *rest: object) -> object:
        written.append(path.name)
        if len(written) == 3:
            path.write_bytes(b"half a file")
            raise _Killed
        return write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "write_stream", until_the_third)
    with pytest.raises(_Killed):
        to_huggingface(tied, tmp_path / "hf", max_shard_bytes=20_000)
    assert not (tmp_path / "hf").exists()
    answer = to_huggingface(tied, tmp_path / "hf", max_shard_bytes=20_000)
    names = [file["name"] for file in answer["files"]]
    assert written == names[:3] + names[2:]
    assert not verify(tied, tmp_path / "hf")["different"]
    beside = {"config.json", "generation_config.json", "README.md", "model.safetensors.index.json", "SHA256SUMS"}
    assert set(contents(tmp_path / "hf")) == {*names, *beside}


def test_after_a_kill_another_conversion_begins_anew(
    tmp_path: Path, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*rest: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(publish.os, "rename", killed)
        with pytest.raises(_Killed):
            to_huggingface(tied, tmp_path / "hf", dtype="fp32")
    to_huggingface(tied, tmp_path / "hf", dtype="bf16")
    assert not verify(tied, tmp_path / "hf")["different"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"), ("hidden_size", None), ("hidden_size", True), ("rope_theta", "abc"),
        ("rope_parameters", [1]), ("rope_parameters", {"rope_type": "default", "rope_theta": "abc"}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}), ("vocab_size", 256.0), ("mlp_only_layers", 3),
        ("mlp_only_layers", [[0]]), ("layer_types", [["x"]]), ("partial_rotary_factor", [1]),
        ("decoder_sparse_step", 0), ("eos_token_id", "2"), ("eos_token_id", [2, True]), ("pad_token_id", [0]),
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_refused_by_its_field(
    key: str, value: object, tmp_path: Path, mixtral: Path
) -> None:
    source = shutil.copytree(mixtral, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "rope" not in k} | {key: value}))
    with pytest.raises(ConversionError, match="config.json: rope_theta|config.json: " + key):
        from_huggingface(source, tmp_path / "ours")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": 3, "b": "x"}}', "7", "{"])
def test_an_index_that_is_none_is_refused(index: str, tmp_path: Path, mixtral: Path) -> None:
    source = shutil.copytree(mixtral, tmp_path / "hf")
    (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match="is damaged"):
        from_huggingface(source, tmp_path / "ours")


def test_a_header_that_is_a_list_is_refused(tmp_path: Path, mixtral: Path) -> None:
    source = shutil.copytree(mixtral, tmp_path / "hf")
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"[1, 2]  ")
    with pytest.raises(ConversionError, match="no safetensors file"):
        from_huggingface(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"3 999\n", "has token 999; the smaller vocabulary has 256"), ("\u00b23 4\n".encode(), "no token ids"),
        (b"\xff\xfe\n", "cannot be read"), (b"7" * 5000, "no token ids"), (b"\n\n", "has no prompts"),
    ],
)  # fmt: skip
def test_prompts_that_are_none_are_refused(
    content: bytes, said: str, tmp_path: Path, tied: Path, mixtral: Path
) -> None:
    (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(ConversionError, match=said):
        read_prompts(tmp_path / "prompts", [tied, mixtral])


def test_options_of_upcycling_without_it_and_a_noise_that_is_none_are_refused(tmp_path: Path, mixtral: Path) -> None:
    for option in ("--upcycle-noise", "--seed"):
        alone = convert("from-hf", mixtral, tmp_path / "ours", option, 1)
        assert alone.returncode == 2 and "need --upcycle-experts" in alone.stderr
    none = convert("from-hf", mixtral, tmp_path / "ours", "--upcycle-experts", 0)
    assert none.returncode == 2
    for noise in ("nan", "-1"):
        ended = convert("from-hf", mixtral, tmp_path / "ours", "--upcycle-experts=4", f"--upcycle-noise={noise}")
        assert ended.returncode == 2 and "is no share" in ended.stderr


def test_an_inference_folder_has_no_logits_and_says_so(tmp_path: Path, tied: Path) -> None:
    assert convert("to-inference", tied, tmp_path / "served", "--tp", 1, "--pp", 1).returncode == 0
    (tmp_path / "prompts").write_text("3 4\n")
    ended = convert("verify", tied, tmp_path / "served", "--prompts", tmp_path / "prompts")
    assert ended.returncode == 2 and "nothing here computes its logits" in ended.stderr
