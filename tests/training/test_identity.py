"""A run folder belongs to one run and to one job at a time."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

import pytest
import yaml

from gpt4moe.config.load import config_from_dict, config_to_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.parallel.slurm_job import SlurmJob
from gpt4moe.runlog.run_files import SUMS_FILE
from gpt4moe.training.identity import identity_of
from gpt4moe.training.launch import load
from gpt4moe.training.run_folder import RunFolder
from tests.numbered_lines import VOCABULARY
from tests.training.command import Event, contents, metrics, train


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step on synthetic tokens, in the corpus's vocabulary."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    assert train(folder, f"model.vocab_size={VOCABULARY}", "training.steps=1")[0].status == 0
    return folder


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.num_layers=3"], ["model.num_layers 2, now 3"]),
        (["model.moe.router.load_balancing_coefficient=0.5"], ["load_balancing_coefficient 0.01, now 0.5"]),
        (["run.seed=7"], ["run.seed 1234, now 7"]),
        (["training.global_batch_size=16"], ["training.global_batch_size 8, now 16"]),
        (["data.document_mask=true"], ["data.document_mask False, now True"]),
        (["data=demo", "data.path=CORPUS"], ["data mock, now ", "tokenizer none, now "]),
        (["data.tokenizer=CORPUS/tokenizer.json"], ["tokenizer none, now "]),
    ],
    ids=lambda value: value[0],
)
def test_another_identity_is_refused_with_the_values(
    overrides: list[str], named: list[str], started: Path, corpus: Path
) -> None:
    before = contents(started)
    overrides = [override.replace("CORPUS", str(corpus)) for override in overrides]
    (ended,) = train(started, f"model.vocab_size={VOCABULARY}", "training.steps=2", *overrides)
    cause, cure = ended.err.splitlines()
    assert ended.status == 2
    assert all(words in cause for words in named), cause
    assert "another run.name" in cure
    assert contents(started) == before


def test_another_stage_is_another_run_and_pretraining_needs_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x", f"run.root={tmp_path}"])
    data = {"data": "mock", "tokenizer": "none"}
    folder = RunFolder.of(run)
    folder.path.mkdir()
    folder.freeze(run, data)
    folder.metrics.write_text('{"step": 1}\n')
    assert not {"stage", "document_mask"} & set(folder.read_identity())  # as in run folders made before there were any
    folder.check_identity(run, data)
    tuned = load_run_config(["+experiment=tiny", "run.name=x", f"run.root={tmp_path}"])
    tuned.stage.kind = Tuning.tune  # type: ignore[assignment]
    monkeypatch.setattr("gpt4moe.training.identity.config_to_dict", lambda _: config_to_dict(run))
    assert identity_of(tuned, data) == identity_of(run, data) | {"stage": "tune"}
    with pytest.raises(ConfigError, match=r"with stage\.kind pretrain, now tune") as caught:
        folder.check_identity(tuned, data)
    assert f"another run.name for a new run, with checkpoint.load={folder.path}" in caught.value.cure


def test_the_order_of_patterns_is_no_part_of_it() -> None:
    base, data = ["+experiment=tiny", "run.name=x"], {"data": "mock", "tokenizer": "none"}
    for key in ("stage.train", "stage.lora.rank=4 stage.lora.targets"):
        one, two = (
            identity_of(load_run_config([*base, *f"{key}={patterns}".split()]), data)
            for patterns in ("['*qkv*','*experts*']", "['*experts*','*qkv*']")
        )
        assert one == two


def test_a_run_folder_with_unsorted_patterns_of_before_goes_on(tmp_path: Path) -> None:
    lora = ["stage.lora.rank=4", "stage.lora.targets=['*qkv*','*experts*']"]
    run = load_run_config(["+experiment=tiny", "run.name=x", f"run.root={tmp_path}", *lora])
    data = {"data": "one", "tokenizer": "none"}
    folder = RunFolder.of(run)
    folder.path.mkdir()
    folder.freeze(run, data)
    folder.metrics.write_text('{"step": 1}\n')
    identity = folder.read_identity()
    identity["lora"]["targets"] = ["*qkv*", "*experts*"]
    (folder.path / "identity.json").write_text(json.dumps(identity))
    (folder.path / SUMS_FILE).unlink()
    folder.check_identity(run, data)
    with pytest.raises(ConfigError, match=r"data one, now two: its sources, shares or phases changed") as caught:
        folder.check_identity(run, data | {"data": "two"})
    assert "A source that was extended since has its samples in another order" in caught.value.cure
    run.stage.lora.targets.append("*proj*")
    with pytest.raises(ConfigError, match=r"with stage\.lora\.targets"):
        folder.check_identity(run, data)


def test_a_level_s_batch_size_may_be_written_out(tmp_path: Path) -> None:
    def run(level: str) -> RunConfig:
        ramp = f"training.length_ramp=[{{seq_length: 64, until_step: 2{level}}}]"
        return load_run_config(["+experiment=tiny", "run.name=x", f"run.root={tmp_path}", ramp])

    data = {"data": "one", "tokenizer": "none"}
    folder = RunFolder.of(run(""))
    folder.path.mkdir()
    folder.freeze(run(""), data)
    folder.metrics.write_text('{"step": 1}\n')
    size = run("").training.global_batch_size
    folder.check_identity(run(f", global_batch_size: {size}"), data)
    with pytest.raises(ConfigError, match=r"training\.length_ramp"):
        folder.check_identity(run(f", global_batch_size: {2 * size}"), data)


class Tuning(str, Enum):
    """A stage of this test alone."""

    tune = "tune"


def test_the_resolved_config_names_every_key_and_starts_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=1")[0].status == 0
    resolved = yaml.safe_load((folder / "resolved.yaml").read_text())
    assert resolved["model"]["hidden_size"] == 32
    assert resolved["optimizer"]["lr"] == 0.002
    assert resolved["parallel"]["tp"] == 1
    assert yaml.safe_load((folder / "starts" / "001.yaml").read_text())["config"] == resolved


def test_a_second_job_on_a_folder_is_refused_and_the_first_goes_on_unharmed(tmp_path: Path) -> None:
    folder, go = tmp_path / "x", tmp_path / "go"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(train, folder, "parallel.tp=2", ranks=2, events=(Event(after_step=2, go=go),))
        try:
            while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 2:
                assert not first.done(), first.result()
            second = train(folder, "parallel.tp=2", ranks=2)
        finally:
            go.touch()
        assert [ended.status for ended in second] == [2, 2]
        cause, cure = second[0].err.splitlines()
        assert f"{folder} is in use by process" in cause and "another run.name" in cure
        assert second[1].err == ""
        assert [ended.status for ended in first.result()] == [0, 0]
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in (folder / "starts").iterdir()] == ["001.yaml"]


def test_a_run_root_that_is_no_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = train(tmp_path / "file" / "x", "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert str(tmp_path / "file" / "x") in cause and "run.root" in cure
    assert ended[1].err == ""


@pytest.mark.parametrize(
    ("file", "content"),
    [("identity.json", "{"), ("identity.json", "[]"), ("starts/001.yaml", "a: ["), ("resolved.yaml", None)],
)
def test_a_damaged_file_of_the_folder_is_refused_by_its_name(
    file: str, content: str | None, started: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(started, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    (ended,) = train(folder, f"model.vocab_size={VOCABULARY}", "training.steps=2")
    assert (ended.status, len(ended.err.splitlines())) == (2, 2), ended.err
    assert f"{folder / file} is damaged or gone." in ended.err and f"checkpoint.load={folder}" in ended.err


def test_a_launch_that_took_no_step_uses_up_no_name(tmp_path: Path) -> None:
    """A model that no memory holds ends after the folder was made; the next command may be another one."""
    overrides, data = ["+experiment=tiny", "run.name=x", f"run.root={tmp_path}"], {"data": "one", "tokenizer": "none"}
    wrong, right = (load_run_config([*overrides, f"model.num_layers={layers}"]) for layers in (5000, 2))
    folder = RunFolder.of(wrong)
    folder.path.mkdir()
    folder.freeze(wrong, data)
    before = folder.run_id
    folder.check_identity(right, data)
    folder.freeze(right, data)
    assert folder.run_id == before and folder.read_identity()["model"]["num_layers"] == 2
    folder.metrics.write_text('{"step": 1}\n')
    folder.check_identity(right, data)
    with pytest.raises(ConfigError, match="num_layers 2, now 5000"):
        folder.check_identity(wrong, data)


@pytest.mark.parametrize("name", ["resolved.yaml", "identity.json"])
def test_a_value_that_rotted_is_found_by_the_files_sum(tmp_path: Path, name: str) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x", f"run.root={tmp_path}", "run.seed=1234"])
    folder, data = RunFolder.of(run), {"data": "one", "tokenizer": "none"}
    folder.path.mkdir()
    folder.freeze(run, data)
    folder.metrics.write_text('{"step": 1}\n')
    whole = (folder.path / name).read_text()
    (folder.path / name).write_text(whole.replace("1234", "1235"))
    with pytest.raises(LaunchError, match=f"{name} is not what was written"):
        folder.check_identity(run, data)
    (folder.path / name).write_text(whole)
    sums = (folder.path / SUMS_FILE).read_text()
    for damaged in (sums.replace("  ", " ", 1), f"{sums}more\n", ""):
        (folder.path / SUMS_FILE).write_text(damaged)
        with pytest.raises(LaunchError, match="is not what was written"):
            folder.check_identity(run, data)
    (folder.path / SUMS_FILE).unlink()  # a folder of before
    folder.check_identity(run, data)


@pytest.mark.parametrize("name", ["my run", "größe", "a:b", "v1(2)", "x~1", "x" * 130])
def test_a_name_that_only_older_versions_gave_goes_on_and_names_no_new_run(tmp_path: Path, name: str) -> None:
    old = load_run_config(["+experiment=tiny", f"run.name='{name}'", f"run.root={tmp_path}"])
    assert config_from_dict(config_to_dict(old)).run.name == name
    words = ["+experiment=tiny", f"run.name='{name}'", f"run.root={tmp_path}"]
    with pytest.raises(ConfigError, match="cannot name a folder"):
        load(words, SlurmJob())
    folder = RunFolder.of(old)
    folder.path.mkdir()
    folder.freeze(old, {"data": "mock", "tokenizer": "none"})
    assert load(words, SlurmJob()).run.name == name
