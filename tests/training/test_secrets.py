"""What the environment keeps secret stays out of every file, line and traceback of a run."""

from pathlib import Path

from tests.training.command import Event, contents, train

SECRET = "s3cr3t-0123456789abcdef0123456789abcdef01234567"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENAI_API_KEY", "GITHUB_TOKEN")


def test_no_secret_of_the_environment_is_written_or_printed(tmp_path: Path) -> None:
    variables = dict.fromkeys(NAMES, SECRET)
    (ended,) = train(tmp_path / "x", "training.steps=2", "tracking.wandb=offline", variables=variables)
    assert ended.status == 0, ended.err
    full = Event(after_step=1, fills_disk=True)
    (failed,) = train(tmp_path / "y", "training.steps=2", events=(full,), variables=variables)
    (refused,) = train(tmp_path / "z", "run.name='${oc.env:WANDB_API_KEY}'", variables=variables)
    assert refused.status == 2 and failed.status != 0
    told = "".join(rank.out + rank.err for rank in (ended, failed, refused))
    files = contents(tmp_path)
    assert any("report.html" in name for name in files) and any("wandb" in name for name in files)
    assert SECRET not in told
    assert [name for name, data in files.items() if SECRET.encode() in data] == []
