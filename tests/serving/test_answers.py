"""Texts in the form of the API: pieces of a stream add up to the whole text and keep back what may be a stop string."""

import tokenizers

from gpt4moe.inference.requests import Completion
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.text import Words
from gpt4moe.serving.answers import Answer
from gpt4moe.serving.desk import Event, Wanted
from gpt4moe.serving.fields import Question
from tests.inference.test_text import CAFE, SPACE, A, T, llama

TOKENIZER = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate("abcX")}, []))
TOKENIZER.decoder = tokenizers.decoders.Fuse()  # type: ignore[assignment]
WORDS = Words(backend=TOKENIZER, end_ids=frozenset(), vocab_size=4, context_length=8)


def test_pieces_keep_back_what_may_be_a_stop_and_add_up_to_the_whole_text() -> None:
    tokens = [0, 1, 0, 1, 2]  # "ab" may begin the stop "abc"
    wanted = Wanted(prompt=[3, 3], max_tokens=6, sampling=Sampling(), stops=("abc",))
    question = Question(
        is_chat=False, wanted=[wanted], num_prompts=1, is_streamed=True, has_usage=True, has_logprobs=True
    )
    answer, pieces = Answer(question, WORDS, "m"), []
    for token in tokens:
        answer.add(Event(0, token=token, logprob=-0.5))
        pieces.append(answer.piece(0))
    answer.add(Event(0, done=Completion(number=0, tokens=tokens, logprobs=[-0.5] * 5, finish_reason="stop")))
    pieces.append(answer.piece(0))
    choices = [piece["choices"][0] for piece in pieces if piece is not None]
    assert answer.is_done and [one["text"] for one in choices] == ["ab", ""]
    assert [one["finish_reason"] for one in choices] == [None, "stop"]
    assert sum(len(one["logprobs"]["tokens"]) for one in choices) == 5  # each token once
    whole = answer.whole()
    assert whole["choices"][0]["text"] == "ab" and answer.end()[0]["usage"] == whole["usage"]
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}


def test_usage_counts_a_prompt_once_and_offsets_are_of_characters() -> None:
    words = llama()
    wanted = [Wanted(prompt=[1, SPACE, A], max_tokens=6, sampling=Sampling(), sample=sample) for sample in range(2)]
    question = Question(
        is_chat=False, wanted=wanted, num_prompts=1, is_streamed=True, has_usage=True, has_logprobs=True
    )
    answer, tokens, offsets = Answer(question, words, "m"), [SPACE, CAFE[0], CAFE[1], T], []
    texts = []
    for token in tokens:
        answer.add(Event(0, token=token, logprob=-0.5))
        piece = answer.piece(0)
        texts.append(piece and piece["choices"][0]["text"])
        offsets += piece["choices"][0]["logprobs"]["text_offset"] if piece else []
    assert texts == [" ", None, "é", "t"] and offsets == [0, 1, 1, 2]
    for index in range(2):
        logprobs = [-0.5] * 4
        answer.add(Event(index, done=Completion(number=index, tokens=tokens, logprobs=logprobs, finish_reason="stop")))
    whole = answer.whole()
    assert [one["text"] for one in whole["choices"]] == [" ét"] * 2
    assert whole["choices"][0]["logprobs"]["text_offset"] == offsets
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
