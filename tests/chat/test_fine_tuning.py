"""A Hugging Face folder is fine-tuned, whole and with LoRA, and goes back: transformers loads it, the template travels.

    Mixtral, tokenizer, template --from-hf--> base --prepare_chat, stage=sft--> full, adapters --to-hf, merge--> folders

TRL's trainer on the same folder and rows is a second opinion: `make test-trl`.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.chat.command import prepare
from gpt4moe.chat.words import read_words
from gpt4moe.config.checksums import changed_files, read_sums
from gpt4moe.convert.adapters import merge
from gpt4moe.convert.from_huggingface import ARGUMENTS, from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.peft_folder import to_peft
from gpt4moe.parallel.environment import Environment
from tests.chat.conftest import BLOCKS
from tests.convert.hf_models import MIXTURE, save_model
from tests.convert.logits import our_logits, their_logits
from tests.spawn import run_ranks
from tests.training.command import metrics, train

VOCABULARY = 304  # the tokenizer's 302, filled up as models do
# Answers of 1 to 9 words: a mean of the rows' means is far from the mean over tokens.
ROWS = [
    {"messages": [{"role": "user", "content": f"word{n}?"}, {"role": "assistant", "content": " and".join("x" * n)}]}
    for n in (1, 2, 5, 9)
]
BATCH = ("training.global_batch_size=4", "training.micro_batch_size=1", "training.steps=2")
SFT = ("stage=sft", "data=demo", "model.moe.router.load_balancing_coefficient=0", "optimizer.lr=0.01",
       "schedule.warmup_steps=0")  # fmt: skip


@pytest.fixture(scope="module")
def folders(hugging_face: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """hf, base, data; the runs full and lora; and what was made of them."""
    root = tmp_path_factory.mktemp("tuned")
    hf = save_model(root / "hf", "Mixtral", vocab_size=VOCABULARY, router_aux_loss_coef=0.0, **MIXTURE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hugging_face / name, hf / name)
    (hf / "chat_template.jinja").write_text(BLOCKS)
    from_huggingface(hf, root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = f"help={root / 'rows.jsonl'}"
    prepare(["--tokenizer", str(hf), "--out", str(root / "data"), "--source", rows, "--valid", rows, "--vocab-size",
             str(VOCABULARY)], lambda lines: None)  # fmt: skip
    model = (root / "base" / ARGUMENTS).read_text().split()
    for name, more in (("full", []), ("lora", ["stage.lora.rank=4"]), ("padded", ["data.pack=false"])):
        data = (f"data.path={root / 'data'}", f"checkpoint.load={root / 'base'}")
        (ended,) = train(root / name, *model, *SFT, *BATCH, *data, *more)
        assert ended.status == 0, ended.err
    merge(root / "lora", root / "merged")
    for name in ("full", "merged", "lora"):
        to_huggingface(root / name, root / f"{name}-hf", dtype="fp32")
    return {path.name: path for path in root.iterdir()}


def test_transformers_loads_what_was_fine_tuned_with_the_same_logits(folders: dict[str, Path]) -> None:
    before, _ = their_logits(folders["hf"])
    for name in ("full", "merged"):
        logits, told = their_logits(folders[f"{name}-hf"])
        assert not any(told.values())
        assert np.abs(logits - our_logits(folders[name])).max() < 1e-4
        assert np.abs(logits - before).max() > 0.1


@pytest.mark.parametrize("name", ["full-hf", "merged-hf", "lora-hf", "merged/tokenizer"])
def test_the_chat_template_travels(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    asked = ROWS[0]["messages"][:1]
    folder = folders["hf"].parent / name
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert (
        rendered
        == "<|im_start|>user\nword1?<|im_end|>\n<|im_start|>assistant\n"
        == read_words(folders["hf"]).template.render(asked)
    )
    end = read_words(folders["hf"]).backend.token_to_id("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(folder).eos_token_id
    assert changed_files(folder) == [] and (folder / "SHA256SUMS").is_file()


def test_adapters_of_a_converted_folder_load_into_peft_on_that_very_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    to_peft(folders["lora"], tmp_path / "peft", model=str(folders["hf"]))
    assert set(read_sums(tmp_path / "peft") or ()) == {"adapter_config.json", "adapter_model.safetensors"}
    assert changed_files(tmp_path / "peft") == []
    pytest.importorskip("peft", reason="no peft here")
    (got,) = run_ranks(1, _peft_logits, folders["hf"], tmp_path / "peft")
    want, _ = their_logits(folders["merged-hf"])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_dense_folder_says_its_settings_too(tmp_path: Path) -> None:
    from_huggingface(save_model(tmp_path / "hf", "Llama", tie_word_embeddings=True), tmp_path / "base")
    model = (tmp_path / "base" / ARGUMENTS).read_text().split()
    assert "model.moe=null" in model and "model.tied_embeddings=true" in model
    (ended,) = train(tmp_path / "run", *model, "training.steps=1", f"checkpoint.load={tmp_path / 'base'}")
    assert ended.status == 0, ended.err


@pytest.fixture(scope="module")
def of_trl(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    pytest.importorskip("trl", reason="no trl here")
    return dict(run_ranks(1, _trl, folders["hf"], sys.path)[0])


def test_trl_learns_the_same_tokens_of_the_same_rows(folders: dict[str, Path], of_trl: dict[str, Any]) -> None:
    from gpt4moe.data.catalogue import Catalogue

    source = Catalogue.open([folders["data"]]).sources["help"]
    tokens, mask = source.tokens("train")[:].tolist(), source.mask("train")[:]
    rows = of_trl["micro"]
    assert tokens == [token for row in rows["input_ids"] for token in row]
    assert [token if learned else -100 for token, learned in zip(tokens, mask, strict=True)] == [
        label for row in rows["labels"] for label in row
    ]


def test_trl_has_the_same_loss_and_gradient_norm_packed_and_padded(
    folders: dict[str, Path], of_trl: dict[str, Any]
) -> None:
    for ours, theirs in (("padded", "batch"), ("padded", "micro"), ("full", "packed")):
        first = metrics(folders[ours])[0]
        assert first["loss"] == pytest.approx(of_trl[theirs]["loss"], rel=2e-6)
        assert first["grad_norm"] == pytest.approx(of_trl[theirs]["grad_norm"], rel=2e-5)
    means = np.mean(of_trl["means"]["losses"])
    assert abs(means - of_trl["micro"]["loss"]) > 0.01, "a mean of means would be another loss"


def _peft_logits(environment: Environment, base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.convert.logits import TOKENS

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def _trl(environment: Environment, hf: Path, path: list[str]) -> dict[str, dict[str, Any]]:
    """One step of TRL's trainer for each way to cut the global batch of four rows, without changing a weight."""
    sys.path[:] = path
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    ways = {
        "batch": {"per_device_train_batch_size": 4},
        "micro": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "packed": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True},
        "means": {"per_device_train_batch_size": 1, "max_steps": 4},
    }
    found = {}
    for name, options in ways.items():
        config = SFTConfig(
            output_dir=str(hf.parent / "trl"), assistant_only_loss=True, max_length=64, learning_rate=0.0, use_cpu=True,
            bf16=False, gradient_checkpointing=False, max_grad_norm=1e9, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, **({"max_steps": 1} | options),
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), args=config,
            train_dataset=Dataset.from_list(ROWS), processing_class=AutoTokenizer.from_pretrained(hf),
        )  # fmt: skip
        columns = trainer.train_dataset[:]
        trainer.train()
        steps = [line for line in trainer.state.log_history if "grad_norm" in line]
        found[name] = {key: columns[key] for key in ("input_ids", "labels")} | {
            "loss": steps[0]["loss"], "grad_norm": steps[0]["grad_norm"], "losses": [line["loss"] for line in steps],
        }  # fmt: skip
    return found
