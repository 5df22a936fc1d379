"""Flipped bits: every resilience.recompute_every steps a step is computed twice from one state, and compared.

    end of the step before   checksums of weights, buffers, masters and moments
    before the first pass    are they the same? are the batches those that the data makes again?
    between the passes       are the batches the same?
    after the second pass    state, batches; then gradients, loss and statistics of the two passes: equal to the bit?
                             then norm, clip and update, from the second pass's gradients

A pass is forward, backward and reduction. It draws nothing at random (noise is a function of the token's number, there
is no dropout), moves no buffer, and begins with gradients and statistics at zero, so two of them are one step. What
each rank gave to collectives says on which rank a difference began (parallel.handed).

Where kernels need not be equal to the bit (a GPU without training.deterministic) the first of these steps is computed
three times. Each tensor's sum and norm may then differ, relative to its norm, by TIMES_CALIBRATED as much as in those
three, and always by a bound of the precision: passes may be equal by chance. A step whose numbers are not finite in any
pass measures nothing, and is no flipped bit: resilience.on_nonfinite says what becomes of it.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from gpt4moe.config.optimizer import Dtype
from gpt4moe.data.batch import Batch
from gpt4moe.errors import CorruptionError
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.collectives import gather_rows
from gpt4moe.parallel.handed import Handed, began_here, checksum, read_together
from gpt4moe.training.engine import sum_of_squares
from gpt4moe.training.step import StepResult, StepRunner

logger = logging.getLogger(__name__)

TIMES_CALIBRATED = 8.0
_ALONE = 64.0
"""Of three passes one is wrong where the nearest two are so many times nearer than the farthest two."""
_LEAST = {Dtype.fp32: 2.0**-16, Dtype.bf16: 2.0**-7}
"""By precision the bound below which no difference counts: some roundings in fp32, one in bf16."""
_NAMED = 2
"""Tensors that an error names of a rank; it counts the rest. So with ranks."""
_TEXT_BYTES = 400
_GIVEN, _NUMBERS = "what it gave to collectives", "the loss and statistics"

Named = Iterator[tuple[str, Tensor]]


class Pass(NamedTuple):
    """What one pass gave on this rank."""

    result: StepResult
    handed: Handed
    names: list[str]
    sums: Tensor
    """[n] int64, of each name its checksum; empty where passes need not be equal to the bit."""
    sizes: Tensor
    """[n, 2] fp64, of each name its sum and norm; empty where passes must be equal to the bit."""


class Recheck:
    """Owns the checksums of a launch's state from the end of a step to the next one."""

    def __init__(self, runner: StepRunner):
        self.runner, self.engine, self.groups = runner, runner.engine, runner.groups
        self.every = runner.run.resilience.recompute_every
        self.is_exact = self.groups.device.type == "cpu" or runner.run.training.deterministic
        self.tolerance: float | None = None
        """Of sums and norms, where passes need not be equal to the bit; None: not measured yet."""
        self.made_again: Callable[[], list[Batch]] | None = None
        """Makes the next checked step's batches once more, from the data; None: they are not compared with it."""
        self._remembered: tuple[int, Tensor] | None = None

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def remember(self, step: int) -> None:
        """At the end of step `step`: takes the state's checksums, where the next step compares them."""
        if self.is_due(step + 1):
            self._remembered = step, self._state()[1]

    def twice(self, step: int, compute: Callable[[], StepResult], batches: list[Batch]) -> StepResult:
        """Computes step `step` twice; its gradients are those of the last pass. Collective over the world.

        Args:
            compute: one pass: gradients from zero, reduced.
            batches: this rank's, the same for every pass.
        Raises: CorruptionError on every rank, which names the ranks and tensors.
        """
        names, before = self._state()
        found = []
        if self._remembered is not None and self._remembered[0] == step - 1:
            found = _unequal(names, self._remembered[1], before)
        given = _batch_sums(batches)
        if self.made_again is not None:
            with raise_together(self.groups):
                found += _other_batches(given, _batch_sums(self.made_again()))
        self._refuse(step, found, since=step - 1)
        passes: list[Pass] = []
        for _ in range(2 if self.is_exact or self.tolerance is not None else 3):
            self._refuse(step, _other_batches(given, _batch_sums(batches)), since=step)
            passes.append(self._pass(compute))
        found = _unequal(names, before, self._state()[1]) + _other_batches(given, _batch_sums(batches))
        self._refuse(step, found, since=step)
        self._compare(step, passes)
        self.made_again = None
        return passes[-1].result

    def _compare(self, step: int, passes: Sequence[Pass]) -> None:
        """Raises: CorruptionError, as `twice`."""
        if self.is_exact:
            one, other = passes
            found = _unequal(other.names, one.sums, other.sums)
            if self._any([len(found) > 0])[0]:
                began = began_here(one.handed, other.handed, bool(found), self.groups)
                self._refuse(step, [] if began is None else [f"seen first {began}", *found], since=step)
                self._refuse(step, found, since=step)  # began on no rank: all that differ
        elif self.tolerance is not None:
            self._refuse(step, _farther(passes[0], passes[1], self.tolerance), since=step)
        else:
            self._calibrate(step, passes)

    def _calibrate(self, step: int, passes: Sequence[Pass]) -> None:
        """Measures the tolerance. Raises: CorruptionError, as `twice`, where one pass is far from the others."""
        pairs = [(a, b) for at, a in enumerate(passes) for b in passes[at + 1 :]]
        is_lost = bool(torch.stack([_is_lost(it) for it in passes]).all(dim=0).any())
        farthest = [float(_distances(a, b).max()) if a.names else 0.0 for a, b in pairs]
        shared = torch.tensor([float(is_lost), *farthest], dtype=torch.float64, device=self.groups.device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        lost, *away = shared.tolist()
        if lost:
            logger.warning("step %d is not finite in any pass: the next checked step measures what may differ", step)
            return
        least = _LEAST[self.runner.run.precision.dtype]
        bound = max(_ALONE * min(away), least)
        if max(away) > bound:
            one, other = pairs[away.index(max(away))]
            self._refuse(step, _farther(one, other, bound), since=step)
        self.tolerance = max(TIMES_CALIBRATED * max(away), least)
        logger.warning(
            "step %d: three passes over one step differ by %.2g: gradients that differ by less than %.2g pass "
            "resilience.recompute_every. training.deterministic=true makes them equal to the bit.",
            step, max(away), self.tolerance,
        )  # fmt: skip

    def _pass(self, compute: Callable[[], StepResult]) -> Pass:
        handed, device = Handed(), self.groups.device
        with handed if self.is_exact and self.groups.layout.world_size > 1 else nullcontext():
            result = compute()
        if not self.is_exact:
            named = list(self._gradients(result))
            sizes = [torch.stack((it.sum(dtype=torch.float64), sum_of_squares([it]).sqrt())) for _, it in named]
            in_order = torch.stack([size.to(device) for size in sizes]).cpu()
            return Pass(result, handed, [name for name, _ in named], read_together([], device), in_order)
        given = read_together(handed.sums, device)  # a difference here may be rounded away in a sum over ranks
        names, sums = [_GIVEN], [checksum(given)]
        for name, tensor in self._gradients(result):
            names.append(name)
            sums.append(checksum(tensor))
        return Pass(result, handed, names, read_together(sums, device), torch.zeros(0, 2, dtype=torch.float64))

    def _gradients(self, result: StepResult) -> Named:
        names = {id(parameter): shard.name for parameter, shard, _ in shards(self.engine.chunks, self.groups)}
        for owned in self.engine.owned():
            yield f"the gradient of {names[id(owned.parameter)]}[{owned.start}:{owned.end}]", owned.gradient
        logged = [result.loss, result.num_tokens, *result.logged.values()]
        numbers = (torch.tensor(logged, dtype=torch.float64), result.routing.flatten(), result.sources.flatten())
        yield _NUMBERS, torch.cat(numbers)

    def _state(self) -> tuple[list[str], Tensor]:
        """Names and checksums of all that this rank keeps from step to step."""
        self.engine.finish_update()
        named = list(self._kept())
        return [name for name, _ in named], read_together([checksum(it) for _, it in named], self.groups.device)

    def _kept(self) -> Named:
        names = {}
        for parameter, shard, _ in shards(self.engine.chunks, self.groups):
            names[id(parameter)] = shard.name
            yield f"weight {shard.name}", parameter
        for buffer, shard in buffers(self.engine.chunks, self.groups):
            yield f"buffer {shard.name}", buffer
        for owned in self.engine.owned():
            place = f"of {names[id(owned.parameter)]}[{owned.start}:{owned.end}]"
            yield f"fp32 master {place}", owned.master
            for name, state in owned.states.items():
                yield f"{name} {place}", state

    def _refuse(self, step: int, found: Sequence[str], *, since: int) -> None:
        """Raises: CorruptionError on every rank where any rank has found something. Collective over the world."""
        if not self._any([len(found) > 0])[0]:
            return
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        text = f"{os.uname().nodename}\0{', '.join(found[:_NAMED])}{more}" if found else ""
        padded = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(self.groups.device).unsqueeze(0)
        told = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gather_rows(mine, _world()).tolist()]
        ranks = [(rank, *text.split("\0", 1)) for rank, text in enumerate(told) if text]
        words = [f"rank {rank} ({node}): {what}" for rank, node, what in ranks[:_NAMED]]
        others = f"; and {len(ranks) - _NAMED} more ranks" if len(ranks) > _NAMED else ""
        earlier = f" A checkpoint of step {since} may hold what is wrong: then take one before." if since < step else ""
        raise CorruptionError(
            f"Step {step} was computed twice (resilience.recompute_every={self.every}), and bits are not what they "
            f"were: {'; '.join(words)}{others}. The weights were not updated.",
            f"Test the memory and processor of {ranks[0][1]}, or leave it out; start again: the run goes on from its "
            f"last checkpoint.{earlier}",
            since,
        )

    def _any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag whether any rank has it. Collective over the world."""
        shared = torch.tensor(flags, dtype=torch.int32, device=self.groups.device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]


def _world() -> distributed.ProcessGroup:
    assert distributed.group.WORLD is not None
    return distributed.group.WORLD


def _unequal(names: Sequence[str], before: Tensor, after: Tensor) -> list[str]:
    return [names[at] for at in (before != after).nonzero().flatten().tolist()]


def _is_lost(one: Pass) -> Tensor:
    """[n] bool: whose sum or norm is not finite."""
    return ~one.sizes.isfinite().all(dim=1)


def _distances(one: Pass, other: Pass) -> Tensor:
    """[n] fp64: how far sums and norms of two passes are apart, relative to the norm: 0 where both are not finite,
    infinite where one alone is."""
    norm = torch.maximum(one.sizes[:, 1], other.sizes[:, 1]).clamp_min(torch.finfo(torch.float32).tiny)
    apart = ((one.sizes - other.sizes).abs() / norm.unsqueeze(1)).amax(dim=1)
    apart[_is_lost(one) ^ _is_lost(other)] = torch.inf
    apart[_is_lost(one) & _is_lost(other)] = 0.0
    return apart


def _farther(one: Pass, other: Pass, bound: float) -> list[str]:
    return [name for name, it in zip(one.names, _distances(one, other).tolist(), strict=True) if it > bound]


def _batch_sums(batches: Sequence[Batch]) -> dict[str, int]:
    """Checksums of all tensors of micro-batches on the CPU."""
    found = {}
    for at, batch in enumerate(batches):
        tensors = {it.name: getattr(batch, it.name) for it in dataclasses.fields(batch) if it.name != "extra"}
        tensors |= {name: extra.value for name, extra in batch.extra.items()}
        for name, tensor in tensors.items():
            if tensor is not None:
                found[f"{name} of micro-batch {at}"] = int(checksum(tensor))
    return found


def _other_batches(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
