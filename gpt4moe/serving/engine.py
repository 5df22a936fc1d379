"""All ranks generate what the desk of rank 0 hands out; texts that arrive join the running batch between two steps.

    rank 0: desk --take--> News --broadcast--> every rank: the same requests join, the same texts are left

Before each step rank 0 sends one number: 0 for nothing new. While there is no text it sends that every
HEARTBEAT_SECONDS, so that no rank waits in a collective until its timeout, and a rank that has died is noticed.

The first copy of the model generates. Where the ranks of an expert belong to several copies (ep over dp), the others
compute along with dummy tokens. Copies that share nothing would idle, so such a layout is refused.
"""

from collections.abc import Sequence

from torch import distributed

from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.inference.load import LoadedModel
from gpt4moe.inference.requests import Limits, Request
from gpt4moe.inference.sight import Sight
from gpt4moe.parallel.agreement import broadcast_int
from gpt4moe.serving.desk import Desk, News, Wanted

HEARTBEAT_SECONDS = 1.0


class Engine:
    """One rank's part. Making one is collective.

    Args:
        sight: of the model; where it reads images, its encoder is loaded now.
        desk: on rank 0; None on the others.
    Raises: ConfigError, on every rank, when copies of the model would idle.
    """

    def __init__(self, model: LoadedModel, sight: Sight, limits: Limits, desk: Desk | None):
        # Imported here: it imports DeepSpeed, which looks for an accelerator then (load.placed).
        from gpt4moe.inference.generation import Generator

        self.groups, self.words, self.sight, self.desk = model.groups, sight.words, sight, desk
        read = None if desk is None else desk.grown
        maker = model.latent_maker() if sight.reads_images else None
        self.generator = Generator(model.chunks, model.run, model.groups, limits=limits, read=read, maker=maker)
        copies = self.generator.num_copies
        if copies > 1 and not self.generator.copies.step_together:
            raise ConfigError(
                f"{self.groups.layout.world_size} ranks are {copies} copies of the model that share nothing, but one "
                "copy serves and the others would idle.",
                "Start tp x pp ranks, or spread the experts over all of them (--ep).",
            )
        self.left: set[int] = set()
        self.num_asked = 0

    def check(self, wanted: Sequence[Wanted]) -> None:
        """Not collective. Raises: ConfigError when a text alone does not fit the cache."""
        self.generator.check([self._request(one, 0) for one in wanted], is_open=True)

    def run(self) -> None:
        """Generates until the desk closes. Collective. Raises: LaunchError when another rank has ended."""
        try:
            for done in self.generator.generate([], arrivals=self._arrivals):
                self.left.discard(done.number)
                if self.desk is not None:
                    self.desk.done(done)
        except RuntimeError as error:
            if self.groups.layout.world_size == 1 or not _is_lost(error):
                raise
            raise LaunchError(
                f"Another rank of the server has ended ({str(error).splitlines()[0][:200]}).",
                "See what that rank, or its node, printed last; then start the server again.",
            ) from error

    def _arrivals(self, is_idle: bool) -> Sequence[Request] | None:
        news = self.desk.take(HEARTBEAT_SECONDS if is_idle else 0) if self.desk is not None else News()
        news = self._sent(news)
        if self.generator.copy_index == 0:
            self.left.update(news.left)
        if news.is_closing:
            return None
        first, self.num_asked = self.num_asked, self.num_asked + len(news.new)
        if self.generator.copy_index:
            return []
        return [self._request(wanted, number) for number, wanted in enumerate(news.new, start=first)]

    def _sent(self, news: News) -> News:
        """Rank 0's, on every rank. Collective."""
        if self.groups.layout.world_size == 1 or not broadcast_int(int(bool(news)), self.groups):
            return news
        holder = [news]
        distributed.broadcast_object_list(holder, src=0, device=self.groups.device)
        return holder[0]

    def _request(self, wanted: Wanted, number: int) -> Request:
        holds_stop = self.words.stop_test(wanted.stops)

        def is_stopped(new: list[int]) -> bool:
            return number in self.left or (holds_stop is not None and holds_stop(new))

        return Request(
            prompt=wanted.prompt, max_tokens=wanted.max_tokens, sampling=wanted.sampling, sample=wanted.sample,
            end_ids=self.words.end_ids, is_stopped=is_stopped, banned=self.sight.banned,
            images=wanted.images,
        )  # fmt: skip


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because its other end has gone, as gloo and NCCL say it."""
    signs = ("connection", "peer", "socket", "gloo", "nccl", "timed out", "remote process")
    return isinstance(error, distributed.DistError) or any(sign in str(error).lower() for sign in signs)
