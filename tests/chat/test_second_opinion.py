"""Our loss on rows of a data folder is transformers' own on the same conversations, masked by transformers itself."""

import json
from pathlib import Path

import torch
from torch.nn import functional

from gpt4moe.chat.source import ChatFiles, write_chat_source
from gpt4moe.chat.words import ChatWords
from gpt4moe.config.load import load_run_config
from gpt4moe.data.loader import build_data
from gpt4moe.objectives.stages import objective_of
from tests.chat.test_template import ROWS


def test_the_loss_of_a_batch_is_that_of_transformers(own: ChatWords, tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.loss.loss_utils import ForCausalLMLoss

    rows = [*ROWS, {"messages": ROWS[0]["messages"][1:3]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), own)
    run = load_run_config(
        ["+experiment=tiny", "run.name=t", "stage=sft", "data.pack=false", f"data.path={tmp_path / 'data'}",
         f"model.vocab_size={own.tokenizer.vocab_size}", "model.seq_length=96"]
    )  # fmt: skip
    (batch,) = build_data(run).train.micro_batches(0, global_batch_size=3, micro_batch_size=3, dp=1, dp_index=0)
    logits = torch.randn(3, 96, own.tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    objective = objective_of(run.stage)
    ours = objective.losses(losses, batch).losses.sum() / objective.num_tokens(batch)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    labels = torch.full((3, 97), -100)
    taken = {}
    for row in rows:
        found = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        taken[tuple(found["input_ids"])] = found["assistant_masks"]
    for at in range(3):
        assert batch.token_ids is not None
        length = int((batch.token_ids[at] >= 0).sum())
        ids = tuple(batch.tokens[at, :length].tolist())
        mask = taken.pop(ids)
        labels[at, :length] = torch.where(torch.tensor(mask).bool(), torch.tensor(ids), -100)
    padded = torch.cat([logits, torch.zeros(3, 1, logits.shape[2])], dim=1)
    theirs = ForCausalLMLoss(padded, labels, logits.shape[2])
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)
