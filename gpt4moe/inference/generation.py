"""generate: requests in, texts out as tokens, on every rank of any layout.

    requests of this copy of the model -> waiting --join, when their blocks are free--> flights of rows
    each step: the next tokens of a flight, packed (batch) -> all stages (stages) -> the next token of each row, drawn
    on one rank of the last stage and sent to all ranks of the copy (drawing) -> rows grow, or leave

There are as many flights as pipeline stages, and they step in turn: while one is in the last stage, the others are in
those before it. Each rank asks for a flight's tokens when its turn comes again.

A copy of the model is tp x pp ranks. A layout has dp x cp copies, and each generates other requests: there is no whole
sequence that context parallelism could cut. All ranks of a copy know the same rows and decide the same. Where the ranks
of an expert belong to several copies (ep over dp), the copies step together: one without a row runs a dummy token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import ceil

from torch import distributed, nn

from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, Gpt4MoeError
from gpt4moe.inference.attention import StepAttention
from gpt4moe.inference.batch import Row, Step, pack
from gpt4moe.inference.cache import BlockPool, KeyValueCache, blocks_of, least_free_bytes
from gpt4moe.inference.cache_room import CacheRoom, Sizes
from gpt4moe.inference.copies import Copies, step_length
from gpt4moe.inference.drawing import Drawing, Watcher
from gpt4moe.inference.image_cache import LatentMaker, image_cache, images_of, num_distinct
from gpt4moe.inference.intake import Arrivals, Intake
from gpt4moe.inference.requests import MOST_IMAGES, Completion, Limits, Request
from gpt4moe.inference.stages import Stages, generating
from gpt4moe.model.parameters import decoder_layers
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups

Reader = Callable[[Row], None]
"""A row that has one more token, on every rank of its copy."""


class Generator:
    """Generates on the ranks of one copy of the model. Owns the cache; use it for as many requests as you like. Making
    one is collective over the world.

    Args:
        chunks: GPTModels, wrapped or not; trained ones too.
        watch: sees every logit that a token is drawn from.
        read: sees every token, to show a text while it grows.
        maker: makes latents of requests' images; None: no request has any.
    """

    def __init__(
        self, chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups, *, limits: Limits | None = None,
        watch: Watcher | None = None, read: Reader | None = None, maker: LatentMaker | None = None,
    ):  # fmt: skip
        self.chunks, self.groups, self.layout = chunks, groups, groups.layout
        self.limits = limits or Limits()
        self.watch, self.read = watch, read
        self.model = run.model
        layers = {index + 1: layer for chunk in chunks for index, layer in decoder_layers(chunk).items()}
        self.dtype = next(chunks[0].parameters()).dtype
        self.cache = KeyValueCache(
            list(layers), num_groups=run.model.query_groups // self.layout.tp, head_size=run.model.head_size,
            dtype=self.dtype, device=groups.device,
        )  # fmt: skip
        self.images = image_cache(chunks, maker, groups, self.dtype)
        copy = self.layout.members("model", groups.rank)
        self.source = next(
            rank for rank in copy if self.layout.coordinate(rank)["tp"] == 0
            and self.layout.coordinate(rank)["pp"] == self.layout.pp - 1
        )  # fmt: skip
        self.num_copies, self.copy_index = groups.dp_cp.size(), groups.dp_cp.rank()
        limit = self.limits.cache_bytes
        self.room = CacheRoom.of(
            run.model, run.parallel, self.dtype.itemsize,
            limit_bytes=least_free_bytes(groups) if limit is None else limit, most_rows=self.limits.max_rows,
        )  # fmt: skip
        self.most_images = 0 if maker is None else max(run.data.max_images, MOST_IMAGES)
        """Of a text that arrives while others run."""
        self.copies = Copies(groups)

    def check(self, requests: Sequence[Request], *, is_open: bool = False) -> None:
        """
        Args:
            is_open: they arrive while others run.
        Raises: ConfigError when the longest text and the most images of a text do not fit the cache, and for images
            without a maker.
        """
        longest = max((len(request.prompt) + request.max_tokens for request in requests), default=1)
        most = max((num_distinct(request.images) for request in requests), default=0)
        if most and self.images.maker is None:
            raise ConfigError(
                "A request has images, but nothing here makes latents of them.",
                "Give a vision model, and Generator(maker=model.latent_maker()).",
            )
        self.room.require(longest, most, self._most_rows() if is_open else None)

    def generate_all(self, requests: Sequence[Request]) -> list[Completion]:
        """The texts of all requests, in their order, on every rank. Copy c generates requests c, c + copies, ...
        Collective over the world. Raises: as generate; on every rank what one copy raises."""
        self.check(requests)
        mine = range(self.copy_index, len(requests), self.num_copies)
        # Copies that step together have agreed before.
        with raise_together(self.groups) if self.num_copies > 1 and not self.copies.step_together else nullcontext():
            found = [
                replace(text, number=mine[text.number]) for text in self.generate([requests[number] for number in mine])
            ]
        if self.num_copies > 1:
            of_copies: list[list[Completion]] = [[] for _ in range(self.num_copies)]
            distributed.all_gather_object(of_copies, found, group=self.groups.dp_cp)
            found = [text for texts in of_copies for text in texts]
        return sorted(found, key=lambda text: text.number)

    def generate(self, requests: Sequence[Request], arrivals: Arrivals | None = None) -> Iterator[Completion]:
        """The texts of this copy's requests, each when it ends. Collective: over the copy's ranks, which have equal
        requests; where copies step together, over all of their ranks, and a copy may have no requests.

        Args:
            arrivals: called before each step; its requests have passed `check`, and are numbered on from `requests`.
        Raises: ConfigError before the first step when a text does not fit the cache. DataError, on all ranks that step
            together, for an image that cannot be read any more and for logits that are no numbers.
        """
        self.check(requests)
        stages = Stages(self.chunks, self.groups)
        intake, num_idle = Intake(requests, arrivals), 0
        asked = intake.asked
        sizes = [(row.most_blocks, num_distinct(row.images)) for row in intake.waiting]
        pool = self._open(self._most_rows() if arrivals is not None else sizes)
        drawing = Drawing(self.groups, self.source, self.watch)
        # A walk round virtual stages would meet other flights; arrivals are agreed on at each step by all ranks.
        flights = [Flight() for _ in range(1 if self.layout.vpp > 1 or arrivals is not None else self.layout.pp)]
        with generating(self.chunks):
            try:
                while num_idle < len(flights) or intake.is_open:
                    flight = flights[0]
                    flights = [*flights[1:], flight]
                    failure: Gpt4MoeError | None = None
                    try:
                        for done in self._grow(flight, drawing, asked, pool):
                            del asked[done.number]
                            yield done
                    except Gpt4MoeError as error:
                        failure = error
                    intake.take(failure, is_idle=num_idle > 0)
                    for done in self._join(intake, flight, flights, pool):
                        del asked[done.number]
                        yield done
                    step = self._next_step(flight.rows, pool)
                    # When no flight has a row, no blocks are taken, so none waits for them.
                    num_idle = num_idle + 1 if step is None else 0
                    if step is None:
                        continue
                    logits = stages.run(StepAttention(step, self.cache, images_of(step, self.images)))
                    for row, count in zip(step.rows, step.counts, strict=True):
                        row.num_cached += count
                    flight.drawn = step.whole
                    drawing.begin(step.whole, logits, asked)
            except (GeneratorExit, Gpt4MoeError) as error:
                for flight in flights:  # else the next call would get their tokens
                    drawing.drop(len(flight.drawn))
                if isinstance(error, Gpt4MoeError):
                    self.copies.end_together(error)
                raise
            finally:
                stages.finish()
                drawing.finish()

    def _open(self, sizes: Sizes) -> BlockPool:
        """Room for the rows of one call, of which there are or may be these."""
        num_blocks, num_slots, num_gathered = self.room.shares(sizes)
        self.images.open(num_slots)
        if not self.room.holds(max(num_blocks, self.cache.num_blocks), num_slots, num_gathered):
            self.cache.clear()  # an earlier call had fewer images, or rows of other lengths
        return BlockPool(num_blocks, num_gathered)

    def _most_rows(self) -> list[tuple[int, int]]:
        """Blocks and images of the rows that may be in flight where any may arrive."""
        return [(blocks_of(self.model.seq_length), self.most_images)] * self.limits.max_rows

    def _join(
        self, intake: Intake, flight: "Flight", flights: Sequence["Flight"], pool: BlockPool
    ) -> Iterator[Completion]:
        """Waiting rows join in order, as long as their blocks are free, and flights stay about equal. Where texts
        arrive, others wait for this step: at most one row joins whose images must be made.

        Returns: rows that are stopped before they begin, as those of clients that have gone; nothing of them is made.
        """
        waiting, is_making = intake.waiting, False
        in_flight = sum(len(one.rows) for one in flights)
        most = ceil(min(self.limits.max_rows, in_flight + len(waiting)) / len(flights))
        while waiting and len(flight.rows) < most and in_flight < self.limits.max_rows:
            row = waiting[0]
            is_stopped = intake.asked[row.number].is_stopped
            if is_stopped is not None and is_stopped([]):
                waiting.popleft()
                yield Completion(number=row.number, tokens=[], logprobs=[], finish_reason="stop")
                continue
            if intake.is_open and is_making and not self.images.has_all(row.images):
                return
            gathered = (len(flight.rows) + 1) * max(one.most_blocks for one in [row, *flight.rows])
            if gathered > pool.num_gathered or not pool.reserve(row.most_blocks):
                return
            is_making = is_making or not self.images.has_all(row.images)
            slots = self.images.join(row.images) if row.images else []
            if slots is None:
                pool.give_back([], row.most_blocks)
                return
            row.image_slots = slots
            flight.rows.append(waiting.popleft())
            in_flight += 1

    def _next_step(self, rows: list[Row], pool: BlockPool) -> Step | None:
        """The next tokens of the rows; None: no copy that steps with this one has any. Collective where copies step
        together."""
        counts = self._counts(rows)
        taking = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        total = sum(counts)
        most = self.copies.most_tokens(total)
        if not most:
            return None
        length, has_dummies = step_length(self.layout, total, most)
        for row, count in taking:
            row.make_room(row.num_cached + count, pool)
        self.cache.grow(pool.high_water, pool.num_blocks)
        return pack(
            [row for row, _ in taking], [count for _, count in taking], num_tokens=length,
            has_dummies=has_dummies, dtype=self.dtype, device=self.groups.device,
        )  # fmt: skip

    def _counts(self, rows: list[Row]) -> list[int]:
        """New tokens of each row in the next step: one of every row that has a cache, then of prompts what fits."""
        left = self.limits.max_step_tokens
        missing = [len(row.tokens) - row.num_cached for row in rows]
        counts = [1 if count == 1 else 0 for count in missing]
        left -= sum(counts)
        for at, count in enumerate(missing):
            if count > 1:
                counts[at] = max(0, min(count, left))
                left -= counts[at]
        return counts

    def _grow(
        self, flight: "Flight", drawing: Drawing, requests: Mapping[int, Request], pool: BlockPool
    ) -> Iterator[Completion]:
        """The rows whose next token was drawn get it; ended rows leave."""
        rows, flight.drawn = flight.drawn, ()
        for row, (token, logprob) in zip(rows, drawing.end(len(rows)), strict=True):
            request = requests[row.number]
            is_end = token in request.end_ids
            if not is_end:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                if self.read is not None:
                    self.read(row)
            is_stop = is_end or (request.is_stopped is not None and request.is_stopped(row.generated))
            if is_stop or row.num_generated >= request.max_tokens:
                flight.rows.remove(row)
                pool.give_back(row.blocks, row.most_blocks)
                self.images.leave(row.images)
                reason = "stop" if is_stop else "length"
                yield Completion(number=row.number, tokens=row.generated, logprobs=row.logprobs, finish_reason=reason)


@dataclass(slots=True)
class Flight:
    """Rows that step together."""

    rows: list[Row] = field(default_factory=list)
    drawn: Sequence[Row] = ()
    """Those whose next token is being drawn."""
