"""Texts in the form of the API: pieces of a stream add up to the whole text and keep back what may be a stop string."""

import tokenizers

from gpt4moe.inference.requests import Completion
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.text import Words
from gpt4moe.serving.answers import Answer
from gpt4moe.serving.desk import Event, Wanted
from gpt4moe.serving.fields import Question

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
