"""Storage, data volume, network and carbon of a plan: against the trainer's own rules, the wire, a published figure."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.plan import PlanOutput
from gpt4moe.data.indexed_writer import token_dtype
from gpt4moe.errors import ConfigError
from gpt4moe.pages.plan_answer import plan_answer, table_answer
from gpt4moe.pages.upkeep_rows import upkeep_rows
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.communication import bytes_of_all_ranks
from gpt4moe.planner.estimate import estimate, timed_work
from gpt4moe.planner.plan_json import to_json
from gpt4moe.planner.run_time import Saving, run_time
from gpt4moe.planner.upkeep import carbon, checkpoint_storage, data_volume, network
from tests.planner.timed import plan_of

ASKED = ("model=mixtral_8x7b", "cluster=h100_80g", "gpus=16", "training.global_batch_size=64", "parallel.ep=8")


def test_saves_kept_and_room_are_those_of_the_trainers_keys() -> None:
    plan = plan_of(*ASKED, "training.steps=95", "checkpoint.every=10", "checkpoint.keep=3", "checkpoint.keep_every=30")
    storage = checkpoint_storage(plan, timed_work(plan), 16, 5.0)
    assert (storage.saves, storage.kept) == (10, 5)  # 10 to 90 and the end; 80, 90, 95 and 30, 60 (and 90)
    assert storage.room_bytes == 6 * storage.save_bytes and storage.written_bytes == 10 * storage.save_bytes
    assert storage.save_bytes == 12 * 46_702_792_704
    assert 16 * storage.device_bytes == pytest.approx(storage.save_bytes, rel=0.01)
    lean = load_plan_config([*ASKED, "beyond.moments=bf16"])
    halved = checkpoint_storage(lean, timed_work(lean), 16, 5.0)
    assert (halved.save_bytes, halved.device_bytes) == (8 * 46_702_792_704, storage.device_bytes * 8 / 12)
    endless = plan_of(*ASKED, "training.steps=1000000000000000000", "checkpoint.every=10")  # takes no memory
    assert checkpoint_storage(endless, timed_work(endless), 16, 5.0).saves == 10**17
    once = checkpoint_storage(plan_of(*ASKED, "checkpoint.every=0"), timed_work(plan), 16, 5.0)
    assert (once.saves, once.kept, once.room_bytes) == (1, 1, once.save_bytes)


@pytest.mark.parametrize("is_async", [True, False])
def test_at_the_stated_rate_saves_cost_their_share_of_the_time(is_async: bool) -> None:
    plan = plan_of(*ASKED, "checkpoint.every=40", "save_share=0.02", f"checkpoint.asynchronous={str(is_async).lower()}")
    storage = checkpoint_storage(plan, timed_work(plan), 16, 5.0)
    written = storage.save_bytes / storage.write_bytes_per_second
    copied = written if storage.copy_bytes_per_second is None else storage.device_bytes / storage.copy_bytes_per_second
    saving = Saving(every_steps=40, seconds=copied, written_seconds=written if is_async else 0.0)
    whole = run_time(1000, 5.0, saving, failures_per_hour=0.0, restart_seconds=0.0)
    assert whole.checkpoint_seconds * 1000 / whole.seconds == pytest.approx(0.02)


def test_tokens_take_what_the_trainers_files_take() -> None:
    for size in (32_000, 65_499, 65_500, 100_352):
        plan = plan_of(*ASKED, f"model.vocab_size={size}")
        volume = data_volume(plan, Layout.from_config(plan.parallel, 16), 1e9, 2e5)
        assert volume.token_bytes == token_dtype(size).itemsize
        assert volume.disk_bytes == 1e9 * volume.token_bytes
        assert volume.read_bytes_per_second == 2e5 * volume.token_bytes
    unknown = data_volume(plan_of(*ASKED), Layout.from_config(plan.parallel, 16), 3e9, 2e5)
    assert (unknown.distinct_tokens, unknown.is_known) == (3e9, False)
    planned = load_plan_config(["+experiment=gpt4"])
    known = sum(source.tokens or 0 for source in planned.data.chosen.values())
    assert data_volume(planned, Layout.from_config(planned.parallel, 24960), 13e12, 1e6).distinct_tokens == known


def test_nodes_together_send_what_all_ranks_send() -> None:
    """One stage: every node sends as much."""
    plan = load_plan_config([*ASKED, "gpus=32", "parallel.tp=4", "parallel.cp=2"])
    layout = Layout.from_config(plan.parallel, 32)
    found, total = network(plan, layout, 4.0), bytes_of_all_ranks(plan, layout)
    assert set(found.groups) == set(total)
    for group, kinds in total.items():
        assert 4 * found.groups[group].sent_bytes == pytest.approx(sum(kinds.values())), group
    assert found.groups["tp"].leaving_bytes == found.groups["cp"].leaving_bytes == found.groups["ep"].leaving_bytes == 0
    assert found.device_bytes_per_second == pytest.approx(found.leaving_bytes / 8 / 4.0)


@pytest.mark.parametrize("vpp", [1, 2])
def test_of_a_node_with_several_stages_each_rank_sends_what_its_own_stage_sends(vpp: int) -> None:
    """Two nodes of four stages, the one as the other turned round, but for the loss: each sends half."""
    plan = load_plan_config(["model=mixtral_8x7b", "cluster=h100_80g", "gpus=16", "training.global_batch_size=64",
                             "parallel.tp=2", "parallel.pp=8", f"parallel.vpp={vpp}", "model.tied_embeddings=true"],
                            )  # fmt: skip
    layout = Layout.from_config(plan.parallel, 16)
    found, total = network(plan, layout, 4.0).groups, bytes_of_all_ranks(plan, layout)
    for group in ("pp", "embedding"):
        assert 2 * found[group].sent_bytes == pytest.approx(sum(total[group].values())), group
    assert found["embedding"].leaving_bytes == found["embedding"].sent_bytes
    # One of the four stages of a node sends half of its messages to the other node, with vpp=2 two of them.
    assert 0 < found["pp"].leaving_bytes < 0.3 * found["pp"].sent_bytes
    plan.cluster.devices_per_node = 12  # the second node has 4 of them
    partial = network(plan, layout, 4.0)
    assert partial.node_ranks in (4, 12)
    assert partial.device_bytes_per_second == pytest.approx(partial.leaving_bytes / partial.node_ranks / 4.0)


def test_the_network_takes_gradients_and_dispatch_of_the_plan() -> None:
    asked = ["model=mixtral_8x7b", "cluster=h100_80g", "gpus=32", "training.global_batch_size=64", "parallel.ep=8",
             "cluster.devices_per_node=4", "cluster.devices_per_nvlink_domain=4"]  # fmt: skip
    own, half, tuned, stack = (
        network(plan, Layout.from_config(plan.parallel, 32), 4.0).groups
        for plan in (load_plan_config([*asked, *more]) for more in (
            [], ["beyond.gradients=bf16"], ["beyond.dispatch=tuned"], ["stack=megatron-bridge-26.04"]))
    )  # fmt: skip
    for group in ("dp_cp", "expert_dp"):  # 4 bytes of a gradient and 2 of a weight
        assert half[group].sent_bytes == stack[group].sent_bytes == pytest.approx(own[group].sent_bytes * 4 / 6)
        assert tuned[group] == own[group]
    # Of a token 2 x 1/2 copies go to the other of 2 domains; 3/4 of the tokens have any that does, and send it once.
    assert tuned["ep"].leaving_bytes == pytest.approx(own["ep"].leaving_bytes * 0.75)
    # Of a token 7/4 copies go to 7 other ranks; tuned, 3 x 15/64 to those of its domain, and 4 x 3/16 over its border.
    # There 4 ranks x 15/64 need it, of which one got it: 3/4 of them are sent to once more.
    once = 3 * 15 / 64 + 4 * 3 / 16 + 4 * 15 / 64 * 3 / 4
    assert tuned["ep"].sent_bytes == pytest.approx(own["ep"].sent_bytes * once / (7 / 4))
    assert half["ep"] == own["ep"]


def test_what_leaves_a_node_follows_from_where_the_ranks_of_a_group_are() -> None:
    plan = load_plan_config([*ASKED, "cluster.devices_per_node=4", "parallel.pp=2"])
    layout = Layout.from_config(plan.parallel, 16)  # ep 8: two nodes, of whose 7 others 4 are elsewhere
    found = network(plan, layout, 4.0).groups
    assert found["ep"].leaving_bytes == pytest.approx(found["ep"].sent_bytes * 4 / 7)
    assert found["pp"].leaving_bytes == found["pp"].sent_bytes
    # A ring over the 8 ranks of a stage leaves each node by one of its 4 links.
    assert found["dp_cp"].leaving_bytes == pytest.approx(found["dp_cp"].sent_bytes / 4)


def test_carbon_is_near_what_was_reported_of_llama_3_1() -> None:
    """Its model card: 405B took 30.84 million H100 hours at 700 W, 8,930 t CO2e by location: 0.414 kg a kWh."""
    found = carbon(plan_of(*ASKED, "pue=1"), 30.84e6 * 0.7)
    assert found is not None and found.kg_co2e == pytest.approx(8930e3, rel=0.1)
    more = carbon(plan_of(*ASKED, "pue=1.5", "grid_kg_co2e_per_kwh=0.02"), 1000.0)
    assert more is not None and (more.hall_kwh, more.kg_co2e) == (1500, 30)


def test_the_plan_shows_them_and_a_cluster_without_watts_says_so(tmp_path: Path) -> None:
    plan = plan_of(*ASKED)
    plan.cluster.watts = None
    data = to_json(estimate(plan))
    assert data["carbon"] is None and upkeep_rows(estimate(plan))[-1][1].startswith("not known: cluster.watts")
    plan = plan_of(*ASKED)
    result = estimate(plan)
    data = to_json(result)
    assert data["carbon"]["kg_co2e"] == pytest.approx(0.436 * 1.1 * data["cost"]["kwh"])  # type: ignore[index]
    assert data["checkpoints"]["save_bytes"] == 12 * 46_702_792_704  # type: ignore[index]
    console = Console(width=200, record=True, file=StringIO())
    for part in table_answer(plan):
        console.print(part, markup=False)
    plan.output, plan.file = PlanOutput.html, str(tmp_path / "plan.html")
    plan_answer(plan)
    text, page = console.export_text(), (tmp_path / "plan.html").read_text()
    for what, number, unit in upkeep_rows(result):
        assert what in text and number in text and f"<td>{what}</td><td>{number}</td><td>{unit}</td>" in page


@pytest.mark.parametrize("wrong", ["save_share=0", "save_share=1", "save_share=nan", "pue=0.9", "pue=inf",
                                   "grid_kg_co2e_per_kwh=-1", "gpus=1000000000000", "cluster.devices=10000001",
                                   "tokens=1e300"])  # fmt: skip
def test_a_value_out_of_range_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split("=")[0]) as caught:
        load_plan_config([wrong])
    assert caught.value.cure.startswith("Set ")
