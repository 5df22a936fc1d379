"""The next token: transformers' distribution by the same filters; uniform numbers of a text alone; the draw itself."""

from dataclasses import replace

import pytest
import torch

from gpt4moe.errors import ConfigError
from gpt4moe.inference.sampling import Sampling, distribution, next_tokens, text_key, uniform

LOGITS = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))


def _theirs(logits: torch.Tensor, sampling: Sampling, seen: list[list[int]]) -> torch.Tensor:
    """transformers' distribution, its processors in its order."""
    from transformers import generation as hf

    processors = [
        hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        hf.TemperatureLogitsWarper(sampling.temperature),
        *([hf.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([hf.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
        *([hf.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]
    scores = logits.clone()
    for processor in processors:
        scores = processor(torch.tensor(seen), scores)
    return torch.softmax(scores, dim=-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.8), Sampling(min_p=0.1),
        Sampling(top_k=20, top_p=0.9, min_p=0.02, temperature=1.7), Sampling(top_p=1e-9), Sampling(top_k=1),
    ],
    ids=str,
)  # fmt: skip
def test_a_token_is_drawn_from_transformers_distribution(sampling: Sampling) -> None:
    wanted = _theirs(LOGITS, sampling, [[0]] * 4)
    assert torch.allclose(distribution(LOGITS, [sampling] * 4).float(), wanted, atol=1e-6)


def test_filters_keep_and_drop_at_their_very_limits() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8, which have no rounding."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log2().float() * torch.tensor(2.0).log()

    def kept(sampling: Sampling) -> int:
        return int((distribution(logits, [sampling]) > 0).sum())

    assert distribution(logits, [Sampling()])[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=1e-7)
    assert [kept(Sampling(top_p=share)) for share in (0.49, 0.51, 0.74, 0.76, 0.9)] == [1, 2, 2, 3, 4]
    assert [kept(Sampling(min_p=share)) for share in (0.51, 0.49, 0.26, 0.24)] == [1, 2, 2, 4]


def test_a_share_of_exactly_the_limit_stays() -> None:
    equal = torch.zeros(1, 4)
    assert (distribution(equal, [Sampling(min_p=1.0)]) > 0).sum() == 4, "min-p: at least this share"
    assert (distribution(equal, [Sampling(top_p=0.5)]) > 0).sum() == 2, "top-p: until the share is reached"


def test_settings_are_each_row_s_own() -> None:
    settings = [Sampling(temperature=0.5), Sampling(top_k=3), Sampling(min_p=0.2), Sampling(top_p=0.3)]
    found = distribution(LOGITS, settings)
    for row, sampling in enumerate(settings):
        assert torch.equal(found[row], distribution(LOGITS[row : row + 1], [sampling])[0])


def test_a_repeated_token_is_penalised_as_in_transformers() -> None:
    seen = [[1, 2, 2], [3, 4, 5], [49, 0, 0], [7, 7, 7]]
    sampling = Sampling(repetition_penalty=1.5, temperature=1e-6)
    wanted = _theirs(LOGITS, sampling, seen).argmax(dim=-1)
    greedy = replace(sampling, temperature=0)
    found, logprob = next_tokens(LOGITS, [greedy] * 4, [0.0] * 4, seen)
    assert torch.equal(found, wanted)
    assert torch.equal(logprob, torch.log_softmax(LOGITS, -1).gather(1, found[:, None])[:, 0])  # of the model itself
    best = LOGITS.argmax(dim=-1).tolist()
    repeated, _ = next_tokens(LOGITS, [replace(greedy, repetition_penalty=100.0)] * 4, [0.0] * 4, [[b] for b in best])
    assert all(token != b for token, b in zip(repeated.tolist(), best, strict=True))


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.3, top_k=6)
    wanted = distribution(LOGITS[:1], [sampling])[0]
    draws = 4000
    uniforms = [uniform(text_key(sampling, [1, 2], sample), 7) for sample in range(draws)]
    found, _ = next_tokens(LOGITS[:1].expand(draws, -1), [sampling] * draws, uniforms, [[]] * draws)
    share = torch.bincount(found, minlength=50).double() / draws
    assert (share - wanted).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard deviations at most
    assert share[wanted == 0].sum() == 0


def test_the_ends_of_the_unit_interval_draw_tokens_that_have_a_probability() -> None:
    for number in (0.0, 1 - 2**-53, 1.0):
        for sampling in (Sampling(top_k=2), Sampling(top_p=0.4), Sampling()):
            found, _ = next_tokens(LOGITS, [sampling] * 4, [number] * 4, [[]] * 4)
            assert (distribution(LOGITS, [sampling] * 4).gather(1, found[:, None]) > 0).all()


def test_uniform_numbers_follow_from_seed_prompt_sample_and_position() -> None:
    numbers = {
        uniform(text_key(Sampling(seed=seed), prompt, sample), position)
        for seed in (0, 1) for prompt in ([1, 2], [12], [2, 1]) for sample in (0, 1) for position in (3, 4)
    }  # fmt: skip
    assert len(numbers) == 24 and all(0 <= number < 1 for number in numbers)
    assert uniform(text_key(Sampling(seed=5), (1, 2), 0), 9) == uniform(text_key(Sampling(seed=5), [1, 2], 0), 9)


def test_a_rounded_logit_changes_hardly_any_draw() -> None:
    """Two layouts round differently; tokens of nearly equal probability may then change places in a sorted list."""
    logits = torch.zeros(200, 1000) + 1e-7 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(1))
    uniforms = [uniform("text", position) for position in range(200)]
    first, _ = next_tokens(logits, [Sampling(top_p=0.999999)] * 200, uniforms, [[]] * 200)
    second, _ = next_tokens(torch.zeros(200, 1000), [Sampling(top_p=0.999999)] * 200, uniforms, [[]] * 200)
    assert (first != second).sum() <= 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"top_k": -1},
              {"repetition_penalty": 0.0}], ids=str,
)  # fmt: skip
def test_settings_that_draw_no_token_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="draws no token"):
        Sampling(**wrong).validate()  # type: ignore[arg-type]
