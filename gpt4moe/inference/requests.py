"""What generation is asked for, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpt4moe.inference.pictures import Picture
from gpt4moe.inference.sampling import Sampling

MOST_IMAGES = 32
"""Of a text that a client asks for, while others run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One text to generate."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int
    """New tokens at most, at least one."""
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    """Number of the sample of its prompt; each is drawn by other random numbers."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the text; they are left out of it."""
    is_stopped: Callable[[list[int]], bool] | None = None
    """Whether the new tokens so far hold a stop string. It must say the same on every rank."""
    images: Sequence[Picture] = ()
    """Of the prompt, in the order of their places."""
    banned: frozenset[int] = frozenset()
    """Tokens that are never drawn: an image token, behind which no image would stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A text that has ended."""

    number: int
    """Of its request."""
    tokens: list[int]
    """The new ones, without the end token."""
    logprobs: list[float]
    """Of each, under the model's own distribution (temperature 1, all tokens)."""
    finish_reason: str
    """stop: the end token or a stop string; length: max_tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is in flight at once."""

    max_rows: int = 32
    """Texts that grow together."""
    max_step_tokens: int = 2048
    """New tokens of a step over all rows; a longer prompt takes several steps."""
    cache_bytes: int | None = None
    """Of the cache on a rank, at most; None: nine tenths of the memory that the machine has free."""
