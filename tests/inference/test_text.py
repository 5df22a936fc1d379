"""Words: special tokens around a prompt, a text's edges, stops, templates, tokenizers of another model."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, normalizers, processors

from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.text import Growing, Words, cut_at_stop, settled, words_of_files

BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2, **BYTES, "\u2581": 259, "a": 260, "c": 261, "t": 262}
SPACE, A, C, T, CAFE = 259, 260, 261, 262, [3 + byte for byte in "é\n".encode()]


def llama(template: str | None = None, *, context_length: int = 16) -> Words:
    """A tokenizer of Llama's kind: it begins texts with <s>, and drops a whole text's first space."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(VOCABULARY, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])  # type: ignore[assignment]
    return Words(
        backend=backend, end_ids=frozenset({2}), vocab_size=263, context_length=context_length, chat_template=template,
        special=(("bos_token", "<s>"),),
    )  # fmt: skip


def test_a_prompt_has_the_tokenizers_own_begin_token_and_a_chat_has_it_once() -> None:
    words = llama("{{ bos_token }}{{ messages[0].content }}")
    assert words.encode("at") == [1, SPACE, A, T] and words.encode("") == [1]
    chat = words.encode(words.render([{"role": "user", "content": "at"}]), is_chat=True)
    assert chat.count(1) == 1 and chat[0] == 1
    assert 1 not in words.encode("a<s>")[1:]  # plain text in a prompt


def test_new_text_keeps_its_first_space_and_a_whole_text_drops_it() -> None:
    words = llama()
    tokens = [SPACE, C, A, T]
    assert words.decode(tokens) == " cat" and words.decode(tokens, is_whole=True) == "cat" and words.decode([]) == ""
    growing = Growing(words)
    assert [growing.add(token) for token in tokens] == [" ", "c", "a", "t"] and growing.rest() == ""


def test_a_character_of_several_tokens_is_told_whole() -> None:
    growing = Growing(llama())
    assert [growing.add(token) for token in [C, *CAFE, A, CAFE[0]]] == ["c", "", "é", "\n", "a", ""]
    assert growing.rest() == "\N{REPLACEMENT CHARACTER}" and growing.length == 4


def test_a_stop_is_found_wherever_the_last_tokens_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    words = llama()
    is_stopped = words.stop_test(["\n", "tat"])
    assert is_stopped is not None and words.stop_test([]) is None
    for num_before in range(30):  # the part begins inside each byte of a character in turn
        before = CAFE[:2] * num_before
        assert is_stopped([*before, CAFE[2]]) and is_stopped([SPACE, *before, T, A, T])
        assert not is_stopped([*before, C, A, T])
    most = 0
    decoded = Words._decoded

    def watched(self: Words, tokens: list[int]) -> str:
        nonlocal most
        most = max(most, len(tokens))
        return decoded(self, tokens)

    monkeypatch.setattr(Words, "_decoded", watched)
    assert not is_stopped([C] * 5000)
    growing = Growing(words)
    assert "".join(growing.add(token) for token in [C, *CAFE] * 50) == "cé\n" * 50
    assert most < 30


def test_a_prompt_far_beyond_the_context_is_refused_before_it_is_tokenized() -> None:
    with pytest.raises(ConfigError, match="10,000,000 characters"):
        llama().encode("a" * 10**7)
    with pytest.raises(ConfigError, match="tokens"):
        llama().encode("a" * 16)


def test_templates_have_what_transformers_gives_them_and_their_errors_are_ours() -> None:
    words = llama("{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
                  "{{ strftime_now('%%') }}")  # fmt: skip
    assert words.render([{"role": "x", "content": "a"}, {"role": "y", "content": "b"}]) == "b%"
    for wrong in ("{{ 1 // 0 }}", "{{ 10.0 ** 1000 }}", "{{ messages[0] + 1 }}", "{% for %}"):
        with pytest.raises(ConfigError, match="does not take these messages"):
            llama(wrong).render([{"role": "x", "content": "a"}])


def test_a_tokenizer_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    llama().backend.save(str(tmp_path / "tokenizer.json"))
    assert words_of_files(tmp_path, vocab_size=300, context_length=8).vocab_size == 300
    with pytest.raises(DataError, match=r"263 tokens, but model\.vocab_size=4096"):
        words_of_files(tmp_path, vocab_size=4096, context_length=8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="Copy or download the folder again"):
        words_of_files(tmp_path, vocab_size=300, context_length=8)


def test_a_text_ends_at_the_first_of_its_stops_and_half_a_character_is_kept_back() -> None:
    assert cut_at_stop("abcd", ["c", "b", "x"]) == "a" == cut_at_stop("abcd", ["b", "c"])
    assert settled("ab\N{REPLACEMENT CHARACTER}", ["bc"]) == "a"
