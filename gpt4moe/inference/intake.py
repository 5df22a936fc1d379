"""The texts of one call of a generator: those that wait, and those that arrive between two steps."""

from collections import deque
from collections.abc import Callable, Sequence

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.inference.batch import Row
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import text_key

Arrivals = Callable[[bool], Sequence[Request] | None]
"""(whether no copy has a row) -> requests that join now, equal on every rank of the copy; None: no more will come. It
may be collective over all copies that step together."""


class Intake:
    """Numbers requests in the order in which they come."""

    def __init__(self, requests: Sequence[Request], arrivals: Arrivals | None):
        self.arrivals = arrivals
        self.asked: dict[int, Request] = {}
        """By number, until their texts end."""
        self.waiting: deque[Row] = deque()
        self.num_asked = 0
        self._add(requests)

    @property
    def is_open(self) -> bool:
        """Whether more may arrive."""
        return self.arrivals is not None

    def take(self, failure: Gpt4MoeError | None, *, is_idle: bool) -> None:
        """Before each step: what arrives waits. Collective as `arrivals` is.

        Args:
            failure: of this copy since its last step.
        Raises: it, after the exchange: only then are the other copies where Copies.end_together tells them.
        """
        arrived = None if self.arrivals is None else self.arrivals(is_idle)
        if failure is not None:
            raise failure
        if arrived is None:
            self.arrivals = None
        self._add(arrived or ())

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.asked[self.num_asked] = request
            self.waiting.append(_row(self.num_asked, request))
            self.num_asked += 1


def _row(number: int, request: Request) -> Row:
    key = text_key(request.sampling, request.prompt, request.sample, [image.digest for image in request.images])
    return Row(
        number, list(request.prompt), len(request.prompt) + request.max_tokens, len(request.prompt), key,
        images=request.images,
    )  # fmt: skip
