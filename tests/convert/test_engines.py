"""Exports in other programs than transformers. Not in `make test`: the engines are downloads of their own
(make test-engines)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.load import open_checkpoint, placed
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.parallel.environment import Environment
from tests.convert.conftest import SHAPE
from tests.spawn import run_ranks
from tests.training.command import train

pytestmark = pytest.mark.engines

PROMPTS = ["word 17 and", "other things\nword", "and 100"]
NUM_TOKENS = 24
MODELS = {
    "mixtral": (),
    "qwen3-moe": (
        "model.qk_norm=true",
        "model.head_dim=12",
        "model.moe.layer_pattern=[0,1]",
        "model.ffn_hidden_size=48",
    ),
    "dense": ("model.moe=null", "model.ffn_hidden_size=48"),
}
MISTRALRS = """
import json, sys
from mistralrs import CompletionRequest, ModelDType, Runner, Which
folder, prompts, num_tokens = json.loads(sys.argv[1])
runner = Runner(which=Which.Plain(model_id=folder, dtype=ModelDType.F32), token_source="none")
requests = [CompletionRequest(prompt=p, model="default", max_tokens=num_tokens, temperature=0.0) for p in prompts]
print(json.dumps([runner.send_completion_request(request).choices[0].text for request in requests]))
"""


def _ours(environment: Environment, run: Path) -> list[str]:
    opened = open_checkpoint(run)
    words = opened.words()
    requests = [
        Request(prompt=words.encode(prompt), max_tokens=NUM_TOKENS, sampling=Sampling(temperature=0),
                end_ids=words.end_ids)
        for prompt in PROMPTS
    ]  # fmt: skip
    with placed(opened) as model:
        texts = Generator(model.chunks, model.run, model.groups).generate_all(requests)
    return [words.decode(text.tokens) for text in texts]


@pytest.mark.parametrize("name", MODELS)
def test_mistralrs_loads_an_export_and_writes_our_greedy_text(name: str, tmp_path: Path, corpus: Path) -> None:
    data = ("data.kind=indexed", f"data.path={corpus}", "model.vocab_size=300", "model.seq_length=64")
    (ended,) = train(tmp_path / "run", *SHAPE, *data, *MODELS[name], "training.steps=30", "schedule.total_steps=30")
    assert ended.status == 0, ended.err
    (wanted,) = run_ranks(1, _ours, tmp_path / "run")
    to_huggingface(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    asked = json.dumps([str(tmp_path / "hf"), PROMPTS, NUM_TOKENS])
    done = subprocess.run(
        [sys.executable, "-c", MISTRALRS, asked], capture_output=True, text=True, timeout=300,
        env=os.environ | {"RUST_LOG": "off", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(set(wanted)) > 1 and all(wanted), "a model that always says the same shows nothing"
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
