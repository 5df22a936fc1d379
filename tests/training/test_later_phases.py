"""A phase of the data that comes to a run under way: taken where nothing was read yet, refused where it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.blend import settled_samples
from gpt4moe.data.passed_over import PassedOver
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.errors import ConfigError
from gpt4moe.training.gone_back import record
from gpt4moe.training.identity import PHASES, differs_from, identity_of
from gpt4moe.training.run_folder import RunFolder
from tests.numbered_lines import VOCABULARY
from tests.training.command import BATCH, SEQ, contents, metrics, saved_state, train


@pytest.fixture(scope="module")
def two_sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another folder of the corpus's tokenizer: alpha of the corpus, and books."""
    folder = tmp_path_factory.mktemp("books")
    texts = [f"thing {i} and word {i * i}\n" for i in range(200)]
    books = SourceText(train=texts, valid=texts[:20], licence="CC0-1.0", description="books")
    write_data_folder(folder, {"books": books}, corpus / "tokenizer.json", lambda amount: None)
    return folder


def phases(*from_steps: int) -> str:
    """Books from each of these steps on, every phase with another share."""
    each = ", ".join(
        f"{{from_tokens: {step * BATCH * SEQ}, shares: {{alpha: 1, books: {number + 1}}}}}"
        for number, step in enumerate(from_steps)
    )
    return f"data.phases=[{each}]"


def test_a_later_phase_with_a_new_source_joins_a_run_under_way_bit_by_bit(
    tmp_path: Path, corpus: Path, two_sources: Path
) -> None:
    small = (f"model.vocab_size={VOCABULARY}", "++data.sources={alpha: 1}", "data=demo", "checkpoint.keep=0")
    alone, both = f"data.path={corpus}", f"data.path=[{corpus},{two_sources}]"
    assert train(tmp_path / "whole", *small, both, phases(4))[0].status == 0
    folder = tmp_path / "x"
    assert train(folder, *small, alone, "training.steps=3")[0].status == 0
    assert PHASES not in json.loads((folder / "identity.json").read_text())
    before = contents(folder)
    (refused,) = train(folder, *small, both, phases(2))
    cause, cure = refused.err.splitlines()
    assert refused.status == 2 and contents(folder) == before
    assert "has read 24 samples (768 tokens): its data.phases" in cause and "from sample 16 (512 tokens) on" in cause
    assert "from_tokens=768 or later" in cure
    (ended,) = train(folder, *small, both, phases(4))
    assert ended.status == 0 and "resume after step 3" in ended.out, ended.err
    assert lasting(folder) == lasting(tmp_path / "whole")
    assert saved_state(folder, 6) == saved_state(tmp_path / "whole", 6) != {}
    # The phase is the past now; another one may follow it, also in a run of another name that begins here.
    (refused,) = train(folder, *small, both, "training.steps=7")
    assert refused.status == 2 and "differ from sample 32 (1,024 tokens) on" in refused.err
    load = f"checkpoint.load={folder}"
    (ended,) = train(tmp_path / "branch", *small, both, phases(4, 6), load, "training.steps=7")
    assert ended.status == 0 and "everything" in ended.out, ended.err + ended.out


def lasting(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without losses of sources, which a run of one source has none of, and of where launches ended."""
    records = metrics(folder)
    return [{key: value for key, value in r.items() if not key.startswith(("loss/", "eval_loss"))} for r in records]


def begun(folder: Path, *overrides: str) -> tuple[RunConfig, RunFolder]:
    """A run folder whose first launch began at step 11, after 10 steps of checkpoint.load."""
    run = load_run_config(["+experiment=tiny", "run.name=x", f"run.root={folder}", *overrides])
    made = RunFolder.of(run)
    (made.path / "starts").mkdir(parents=True)
    made.metrics.write_text('{"step": 11}\n')
    (made.path / "starts" / "001.yaml").write_text("{first_step: 11, config: {}}")
    (made.path / "resolved.yaml").write_text("{}")
    return run, made


def of(*starts: int, last: str = "") -> dict[str, str]:
    """CheckedData.identity with phases from these samples on."""
    chain = [[start, f"hash {starts[: number + 1]}"] for number, start in enumerate(starts)]
    chain[-1][1] = last or chain[-1][1]
    return {"tokenizer": "none", "data": chain[-1][1], PHASES: json.dumps(chain)}


def test_only_what_was_not_read_may_change_and_the_last_launch_counts(tmp_path: Path) -> None:
    run, folder = begun(tmp_path)
    read = run.step_sizes.samples(10)
    keys = {key: value for key, value in of(0, read).items() if key != PHASES}
    folder.path.joinpath("identity.json").write_text(json.dumps({"run_id": "1", **identity_of(run, of(0, read))}))
    for later in (of(0), of(0, read), of(0, read, read + 9), of(0, read + 1), keys):
        folder.check_identity(run, later)
        folder.freeze(run, later)
        assert folder.read_identity()["data"] == later["data"] and folder.run_id == "1"
        folder.check_identity(run, later)
        folder.freeze(run, of(0, read))
    for other in (of(0, read - 1), of(0, last="other")):
        with pytest.raises(ConfigError):
            folder.check_identity(run, other)
    record(folder.path, PassedOver(((read, 40),)))  # what it went back from was read, too
    with pytest.raises(ConfigError, match=rf"has read {read + 40:,} samples .* differ from sample {read:,} "):
        folder.check_identity(run, of(0, read + 1))
    with pytest.raises(ConfigError, match=r"training.length_ramp \[\]"):
        folder.check_identity(begun_with(run, "training.length_ramp=[{seq_length: 64, until_step: 9}]"), of(0, read))


def begun_with(run: RunConfig, *overrides: str) -> RunConfig:
    return load_run_config(["+experiment=tiny", "run.name=x", f"run.root={run.run.root}", *overrides])


def test_phases_of_a_run_of_before_are_known_by_their_hash_alone() -> None:
    old = {"data": "hash (0, 5)"}
    new = {**of(0, 5, 9), PHASES: json.loads(of(0, 5, 9)[PHASES])}
    assert differs_from(old, new) == differs_from(new, old | {"x": 1}) == 9
    assert differs_from(old, {"data": "hash (0, 6)"}) == 0
    # A merged checkpoint has the phases of its adapters and data of another name.
    assert differs_from({**new, "data": "merged from x"}, new) == 0


def test_shorter_samples_are_settled_to_the_end_of_their_part() -> None:
    ramp = "training.length_ramp=[{seq_length: 64, until_step: 10, global_batch_size: 16}]"
    run = load_run_config(["+experiment=tiny", "run.name=x", ramp])
    assert [settled_samples(run, drawn) for drawn in (0, 1, 159, 160, 161)] == [0, 160, 160, 160, 161]
