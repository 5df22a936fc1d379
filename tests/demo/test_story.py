"""What `make train` tells, whole, on a small model: trained, killed, resumed with the same losses, summed up."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from gpt4moe.config.load import load_run_config
from gpt4moe.demo import story
from gpt4moe.demo.corpus import build_demo_corpus
from gpt4moe.demo.sources import Document
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.legality import require_legal
from gpt4moe.runlog.metrics_log import read_metrics


def _documents() -> list[Document]:
    return [
        Document(path=f"{i}", text=f"The number {i} has the square {i * i}. " * 40, licence="CC0-1.0")
        for i in range(120)
    ]


@pytest.mark.parametrize("num_processes", story.LAYOUTS)
def test_the_layout_for_a_number_of_processes_is_legal(num_processes: int) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x", *story.LAYOUTS[num_processes]])
    require_legal(run.model, run.parallel, run.training, num_processes)


def test_a_number_of_processes_without_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="NPROC=3"):
        story.tell(3, [])


def test_make_train_kills_resumes_with_equal_losses_and_sums_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_demo_corpus(tmp_path / "data", vocab_size=300, sources={"text": _documents})
    small = [
        "model.vocab_size=300", "model.seq_length=32", "model.hidden_size=32", "model.num_layers=2",
        "model.moe.ffn_hidden_size=32", "training.steps=16", "training.global_batch_size=8", "checkpoint.every=8",
        "training.eval_samples=8", "schedule.total_steps=16", "schedule.warmup_steps=2", f"data.path={tmp_path}/data",
        f"run.root={tmp_path}/runs",
    ]  # fmt: skip
    told = io.StringIO()
    monkeypatch.setattr(story, "Console", lambda **_: Console(file=told, width=120))
    status = story.tell(2, small)
    folder = tmp_path / "runs" / "tiny-2"
    assert "Equal to the last bit." in told.getvalue()
    assert "Resumed at step 9" in told.getvalue()
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == list(range(1, 17))
    assert (folder / "checkpoints" / "step-00000016" / "manifest.json").exists()
    assert "The function returns" in (folder / "report.html").read_text()
    assert "nothing missing, unexpected or mismatched" in told.getvalue()
    assert "Weights: 0 of 17 tensors differ. Logits of 3 prompts" in told.getvalue()
    assert f"generate.py {folder / 'exported' / 'step-00000016'}" in told.getvalue()
    # The status is the model's: below the unigram entropy and no dead expert. So few steps need not reach it.
    assert status in (0, 1)
    assert story.tell(2, small) == status, "a finished story is told again from what is there"
    assert len(list((folder / "starts").glob("*.yaml"))) == 2
