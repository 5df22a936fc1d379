"""Data of conversations has tokenizer and template as Hugging Face has them; a run answers and exports with them."""

from pathlib import Path

from gpt4moe.chat.source import ChatFiles, write_chat_source
from gpt4moe.chat.words import TOKENIZER_FOLDER, ChatWords, read_words
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.convert.model_files import tokenizer_files
from gpt4moe.inference.text import words_of_data
from tests.chat.test_source import lines

ASKED = [{"role": "user", "content": "word1?"}]


def test_a_run_s_words_and_its_export_have_the_template_of_its_conversations(own: ChatWords, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 4)
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), own)
    run = load_run_config(["+experiment=tiny", "stage=sft", "run.name=t", f"data.path={tmp_path / 'data'}",
                           f"model.vocab_size={own.tokenizer.vocab_size}"])  # fmt: skip
    words = words_of_data(run)
    assert words is not None and words.end_ids == {own.eos_id}
    prompt = words.encode(words.render(ASKED), is_chat=True)
    assert words.decode(prompt, is_whole=True) == "user<|endoftext|>word1?<|endoftext|>assistant<|endoftext|>"
    identity = {"tokenizer": file_sha256(tmp_path / "data" / "tokenizer.json")}
    manifest = Manifest(
        step=1, consumed_samples=0, consumed_per_source={}, optimizer_step=1, run_id="x", identity=identity,
        config=config_to_dict(run), layout="", versions={}, files=[],
    )  # fmt: skip
    files, ids = tokenizer_files(tmp_path, manifest, run, None)
    assert files["chat_template.jinja"].decode() == own.template.source and ids["eos_token_id"] == own.eos_id
    for name, content in files.items():
        (tmp_path / "exported").mkdir(exist_ok=True)
        (tmp_path / "exported" / name).write_bytes(content)
    again = read_words(tmp_path / "exported")
    assert again.template == own.template and (tmp_path / "data" / TOKENIZER_FOLDER).is_dir()
