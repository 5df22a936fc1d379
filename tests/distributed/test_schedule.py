"""The order that Megatron really ran, with every message it posted, is what the tables say."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed

from gpt4moe.config.load import load_run_config
from gpt4moe.data.batch import Batch
from gpt4moe.model.gpt import build_model
from gpt4moe.model.transformer_config import batches_messages
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.pipeline.messages import Exchange, Program, programs
from gpt4moe.pipeline.schedule import Pass, Slot
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from tests.distributed.case import BASE
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

# The numbers of micro-batches: fewer than stages, no multiple of them, a multiple.
SHAPES = {
    (1, 1): (3,), (2, 1): (1, 3), (4, 1): (1, 3, 6), (2, 2): (2, 6), (4, 2): (4, 8),
}  # fmt: skip


def recorded(environment: Environment, pp: int, vpp: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each number of micro-batches, and each way to post messages that the shape allows.

    Returns: is batched, the number; log: slots and (is send, peer, channel) of this rank, as they happened; numbers:
        loss and gradient norm.
    """
    layout = (f"parallel.pp={pp}", f"parallel.vpp={vpp}", f"model.num_layers={pp * vpp}")
    run = load_run_config([*BASE, *layout, "training.micro_batch_size=1"])
    with world(environment) as device:
        groups = ProcessGroups.create(
            Layout.from_config(run.parallel, environment.world_size), environment.rank, device, run.run.seed
        )
        engine = MegatronEngine(build_model(run, groups), run, groups)
        runner = StepRunner(run, engine, groups)
        log: list[Any] = []
        _watch_chunks(engine.chunks, log)
        logs = []
        for batched in (False, True) if vpp == 1 else (False,):
            # What a GPU would choose, set on the config that all chunks share.
            assert not batches_messages(run.parallel, on_gpu=False)
            engine.chunks[0].config.batch_p2p_comm = batched and batches_messages(run.parallel, on_gpu=True)
            with pytest.MonkeyPatch.context() as patch:
                _watch_messages(patch, groups, log, batched=batched)
                for count in counts:
                    log.clear()
                    result = runner.forward_backward([_numbered(run.model.seq_length, i) for i in range(count)])
                    logs.append({"batched": batched, "count": count, "log": list(log)})
                    engine.reduce()
                    logs[-1]["numbers"] = (result.loss, engine.norm())
        return logs


def _numbered(seq_length: int, index: int) -> Batch:
    """A micro-batch whose every token is its number."""
    tokens = torch.full((1, seq_length), index)
    return Batch(
        tokens=tokens, labels=tokens, loss_mask=torch.ones(1, seq_length), position_ids=torch.arange(seq_length)[None]
    )


def _watch_chunks(chunks: list[Any], log: list[Any]) -> None:
    def after_forward(index: int, tokens: torch.Tensor, output: torch.Tensor) -> None:
        micro_batch = int(tokens[0, 0])
        log.append(Slot(Pass.forward, index, micro_batch))
        output.register_hook(lambda _: log.append(Slot(Pass.backward, index, micro_batch)))

    for index, chunk in enumerate(chunks):
        chunk.register_forward_hook(
            lambda _, args, given, output, index=index: after_forward(index, given["input_ids"], output),
            with_kwargs=True,
        )


def _watch_messages(patch: pytest.MonkeyPatch, groups: ProcessGroups, log: list[Any], *, batched: bool) -> None:
    stages, post_all = distributed.get_process_group_ranks(groups.pp), distributed.batch_isend_irecv

    def posted_together(messages: list[Any]) -> Any:
        for each in messages:
            is_send = each.op is distributed.isend
            log.append((is_send, stages.index(each.peer), each.group is distributed.group.WORLD))
        return post_all(messages)

    def watch(name: str, peer_name: str) -> None:
        original = getattr(distributed, name)

        def posted(**given: Any) -> Any:
            log.append((name == "isend", stages.index(given[peer_name]), given["group"] is distributed.group.WORLD))
            return original(**given)

        patch.setattr(distributed, name, posted)

    if batched:
        patch.setattr(distributed, "batch_isend_irecv", posted_together)
    else:
        watch("isend", "dst")
        watch("irecv", "src")


def flat(program: Program) -> list[Any]:
    items: list[Any] = []
    for item in program:
        if isinstance(item, Exchange):
            items += [(post.is_send, post.peer, post.channel == "odd sends") for post in item.posts]
        else:
            items.append(item)
    return items


@pytest.fixture(scope="module")
def ran() -> Any:
    return cache(lambda pp, vpp: run_ranks(pp, recorded, pp, vpp, SHAPES[pp, vpp]))


@pytest.mark.parametrize(("pp", "vpp"), SHAPES)
def test_megatron_ran_the_slots_and_posted_the_messages_of_the_tables(pp: int, vpp: int, ran: Any) -> None:
    for rank, logs in enumerate(ran(pp, vpp)):
        for one in logs:
            count, batched = one["count"], one["batched"]
            expected = programs(pp=pp, vpp=vpp, micro_batches=count, batched=batched)[rank]
            assert one["log"] == flat(expected), (rank, count, batched)


@pytest.mark.parametrize("pp", [pp for pp, vpp in SHAPES if vpp == 1])
def test_batched_messages_give_the_same_losses_and_gradients(pp: int, ran: Any) -> None:
    for logs in ran(pp, 1):
        numbers = {one["batched"]: [o["numbers"] for o in logs if o["batched"] is one["batched"]] for one in logs}
        assert numbers[True] == numbers[False]
