"""The valid files that the fuzz damages: one small model in every format, its data, a run folder, texts, chats, images.

    data/  ckpt/  adapters/  runs/first/  runs/second/  hf/  back/  inference/  texts/  chat/  media/  tokenizer.json

Made in a second or two, without training: what reads them can't tell.
"""

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np

from gpt4moe.architecture.tensors import logical_buffers, logical_shapes
from gpt4moe.architecture.trained import adapter_shapes
from gpt4moe.checkpoint.base import reference
from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.data.check import check_data
from gpt4moe.data.passed_over import GoingBack, PassedOver
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.slurm_job import SlurmJob
from gpt4moe.runlog.events_log import EventsLog
from gpt4moe.training.gone_back import record
from gpt4moe.training.identity import identity_of
from gpt4moe.training.run_folder import RunFolder
from tests.checkpoint.builders import dealt, write_checkpoint
from tests.media.conftest import image, pairs

VOCABULARY = 300
SMALL = (
    "+experiment=tiny", "data.path=data", f"model.vocab_size={VOCABULARY}", "model.num_layers=2",
    "model.hidden_size=16", "model.seq_length=16", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=16",
    "training.steps=10", "training.global_batch_size=4", "training.micro_batch_size=1", "training.eval_samples=4",
    "tracking.wandb=disabled",
)  # fmt: skip
"""Of a run in the case's folder; without its name."""
STEP = 3
CHECKPOINT = f"runs/first/checkpoints/step-{STEP:08d}"


def make_world(folder: Path) -> Path:
    """Fills `folder`."""
    _data(folder)
    run = load_run_config([*SMALL, "run.name=first", f"data.path={folder / 'data'}"])
    _run_folder(folder, run, "first")
    _run_folder(folder, run, "second")
    _checkpoint(folder / CHECKPOINT, run)
    went = GoingBack(step=STEP + 2, to_step=STEP, newest=STEP, samples=8, cause="a spike", time=1e9)
    record(folder / "runs" / "first", PassedOver(((4 * STEP, 8),)), [went])
    shutil.copytree(folder / CHECKPOINT, folder / "ckpt")
    _adapters(folder)
    to_huggingface(folder / "ckpt", folder / "hf", max_shard_bytes=30_000, tokenizer=folder / "tokenizer.json")
    from_huggingface(folder / "hf", folder / "back")
    to_inference_layout(folder / "ckpt", folder / "inference", tp=2, pp=2)
    _inputs(folder)
    return folder


def _data(folder: Path) -> None:
    texts = [f"word {i} and {i * i} other things, 12 + {i}?\n" for i in range(200)]
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY, special=["<image>"])
    (folder / "data").mkdir()
    for path in (folder / "tokenizer.json", folder / "data" / "tokenizer.json"):
        tokenizer.backend.save(str(path))
    sources = {
        name: SourceText(train=texts, valid=texts[:40], licence="CC0-1.0", description="lines")
        for name in ("alpha", "beta")
    }
    write_data_folder(
        folder / "data", sources, folder / "data" / "tokenizer.json", lambda amount: None, shard_bytes=4000
    )


def _as_stored(run: RunConfig) -> dict[str, object]:
    """What a manifest has of a run that was launched beside its data."""
    config = config_to_dict(run)
    config["data"]["path"] = "data"
    return config


def _run_folder(folder: Path, run: RunConfig, name: str) -> None:
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, name=name, root=str(folder / "runs")))
    files, identity = RunFolder.of(run), check_data(run).identity
    files.acquire(SlurmJob())
    files.freeze(run, identity)
    files.record_start(run, job=SlurmJob(), layout=Layout.from_config(run.parallel, 1), first_step=1)
    assert files.lock is not None
    files.lock.close()
    (files.path / ".lock").unlink()
    with EventsLog(files.path / "events.jsonl") as log:
        log.write(
            "start", at=1e9, run=name, job=None, submitted=None, job_started=None, ranks=1, layout="1 rank",
            total_steps=10, resumed_step=0, redone_steps=0, redone_seconds=0.0, last_sign_of_life=None,
        )  # fmt: skip
        log.write("first_step", at=1e9 + 12, step=1, seconds=2.0)
        log.write("stop", at=1e9 + 20, step=STEP, reason="TERM", is_error=False)
    records = [
        {"step": step, "loss": 5.0, "step_seconds": 2.0, "tokens_per_second": 5.0} for step in range(1, STEP + 1)
    ]
    (files.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _checkpoint(folder: Path, run: RunConfig) -> None:
    rng = np.random.default_rng(1)
    shapes = logical_shapes(run.model)
    weights = {f"weight/{name}": rng.standard_normal(shape, np.float32) * 0.1 for name, shape in shapes.items()}
    buffers = {f"buffer/{name}": np.zeros(shape, np.float32) for name, shape in logical_buffers(run.model).items()}
    moments = {f"{kind}/{name}": np.abs(weights[f"weight/{name}"])
               for kind in ("exp_avg", "exp_avg_sq") for name in shapes}  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        folder, dealt({**weights, **buffers, **moments}, 2), block_bytes=40_000, step=STEP, config=_as_stored(run),
        identity=identity_of(run, check_data(run).identity), tensor_names=[*weights, *buffers],
        consumed_samples=4 * STEP, consumed_per_source={"alpha": 6, "beta": 6}, optimizer_step=STEP,
    )  # fmt: skip


def _adapters(folder: Path) -> None:
    run = load_run_config([
        *SMALL, "run.name=adapted", f"data.path={folder / 'data'}", "stage.lora.rank=2",
        "stage.lora.targets=['*']", "checkpoint.load=ckpt",
    ])  # fmt: skip
    shapes = adapter_shapes(run.model)
    rng = np.random.default_rng(2)
    weights = {f"weight/{name}": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_checkpoint(
        folder / "adapters", dealt(weights, 1), step=STEP, config=_as_stored(run), tensor_names=list(weights),
        identity=identity_of(run, check_data(run).identity), base=reference(folder / "ckpt") | {"folder": "ckpt"},
    )  # fmt: skip


def _inputs(folder: Path) -> None:
    """What the tools that make data read."""
    for name in ("texts", "chat"):
        (folder / name).mkdir()
    texts = [{"text": f"line {n} of words"} for n in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": f"word{n}?"}, {"role": "assistant", "content": "and more"}]}
        for n in range(20)
    ] + [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]} for _ in range(10)]
    chats += [{"instruction": "say", "input": "", "output": "yes"} for _ in range(10)]  # type: ignore[dict-item]
    for path, rows in ((folder / "texts" / "a.jsonl", texts), (folder / "chat" / "a.jsonl", chats)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs(folder / "media", 12)
    with tarfile.open(folder / "media" / "a.tar", "w") as tar:
        for number in range(12):
            for suffix, data in (("png", image(number)), ("txt", b"a caption"), ("json", b'{"caption": "x"}')):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
