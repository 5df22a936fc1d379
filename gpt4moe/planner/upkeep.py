"""What a run needs beside its devices: storage for checkpoints, the data that it reads, the network, carbon.

    checkpoint_size -> bytes a save, of those kept, of all; the write rate at which a save costs its share of the time
    tokens          -> bytes on disk, bytes read per second
    communication   -> bytes that a node sends in a step, by group, and what of them leaves the node
    kWh             -> kg CO2e: x the hall's PUE x the grid's intensity

All is arithmetic of the run that estimate.py timed. docs/plan-decisions.md says what each number assumes.
"""

from dataclasses import asdict, dataclass
from math import lcm

from gpt4moe.config.plan import PlanConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.checkpoint_size import checkpoint_bytes, saved_bytes
from gpt4moe.planner.communication import bytes_per_step
from gpt4moe.planner.layer_time import copies_kept
from gpt4moe.planner.stacks import efficiency_of
from gpt4moe.planner.work import Work

WIDE_VOCABULARY = 65_500
"""From so many tokens on one takes 4 bytes on disk, before 2 (data/indexed_writer.token_dtype, as Megatron)."""
GROUPS = {
    "tp": "tp", "cp": "cp", "ep": "ep", "etp": "etp", "pp": "pp", "embedding": "pp", "dp_cp": "dp_cp",
    "expert_dp": "expert_dp", "model": "model",
}  # fmt: skip
"""Group of planner/communication.py -> whose ranks these are (Layout.members)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upkeep:
    """Everything here, of one plan."""

    checkpoints: "CheckpointStorage"
    data: "DataVolume"
    network: "Network"
    carbon: "Carbon | None"
    """None: the cluster's power is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointStorage:
    """Checkpoints of a run. Bytes, bytes per second."""

    save_bytes: float
    """Of one checkpoint, all ranks together."""
    device_bytes: float
    """That the device with the largest part writes."""
    saves: int
    kept: int
    """When the run has ended: the newest checkpoint.keep, and those of checkpoint.keep_every."""
    room_bytes: float
    """The most there is at once: those kept, and the one that is being written before the oldest is deleted."""
    written_bytes: float
    """Of all saves."""
    write_bytes_per_second: float
    """Of all ranks together, at which a save costs save_share of the time: a synchronous save stops training for so
    long, an asynchronous one may take until the next save."""
    copy_bytes_per_second: float | None
    """Of one device to its host, at which an asynchronous save stops training for save_share; None: synchronous."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataVolume:
    """Text that a run reads; images come on top."""

    tokens: float
    """Read over the run."""
    distinct_tokens: float
    """On disk, each counted once: of all sources where their data or their configuration says; else those read."""
    is_known: bool
    """False: how much is on disk is not known, and is taken as if every token were read once."""
    token_bytes: int
    read_bytes_per_second: float
    """By all replicas together, each sample once."""
    rank_reads: int
    """How many ranks read each sample: every rank reads its replica's."""

    @property
    def disk_bytes(self) -> float:
        return self.distinct_tokens * self.token_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeTraffic:
    """Bytes of one group that the ranks of one node send in a step."""

    sent_bytes: float
    leaving_bytes: float
    """To other nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Of the node that sends most to others, in one step."""

    node_ranks: int
    groups: dict[str, NodeTraffic]
    step_seconds: float

    @property
    def leaving_bytes(self) -> float:
        return sum(traffic.leaving_bytes for traffic in self.groups.values())

    @property
    def device_bytes_per_second(self) -> float:
        """What leaves the node, for each of its devices, as a mean over the step."""
        return self.leaving_bytes / self.node_ranks / self.step_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Carbon:
    """Emissions of the electricity; those of making the devices are not in it."""

    kg_co2e: float
    hall_kwh: float
    """With the cooling of the hall."""
    pue: float
    grid_kg_co2e_per_kwh: float


def upkeep(
    plan: PlanConfig, work: Work, layout: Layout, *, step_seconds: float, tokens: float, kwh: float | None
) -> Upkeep:
    """Args: step_seconds: of a step without saves and failures. tokens: of the run. kwh: of devices and servers."""
    per_step = plan.training.global_batch_size * plan.model.seq_length
    return Upkeep(
        checkpoints=checkpoint_storage(plan, work, layout.world_size, step_seconds),
        data=data_volume(plan, layout, tokens, per_step / step_seconds),
        network=network(plan, layout, step_seconds), carbon=carbon(plan, kwh),
    )  # fmt: skip


def upkeep_json(found: Upkeep) -> dict[str, object]:
    """Keys of a plan's JSON. Bytes, bytes per second, tokens, kWh, kg."""
    data, net = found.data, found.network
    return {
        "checkpoints": asdict(found.checkpoints),
        "data": {**asdict(data), "disk_bytes": data.disk_bytes},
        "network": {
            "node_ranks": net.node_ranks,
            "groups": {group: asdict(traffic) for group, traffic in net.groups.items()},
            "device_bytes_per_second": net.device_bytes_per_second,
            "leaving_bytes": net.leaving_bytes,
        },
        "carbon": None if found.carbon is None else asdict(found.carbon),
    }


def checkpoint_storage(plan: PlanConfig, work: Work, world: int, step_seconds: float) -> CheckpointStorage:
    """Args: step_seconds: of a step without saves and failures."""
    steps, config = plan.training.steps, plan.checkpoint
    every = min(config.every or steps, steps)
    saves = -(-steps // every)  # every so many steps, and at the end
    kept = min(config.keep or saves, saves)
    if config.keep_every and kept < saves:
        oldest = every * (saves - kept + 1)  # of the newest; those of keep_every lie before it
        kept += (oldest - 1) // lcm(every, config.keep_every)
    size = checkpoint_bytes(plan.model, work.trained, moment_bytes=work.moment_bytes)
    of_device = saved_bytes(work, world)
    interval, stopped = every * step_seconds, plan.save_share / (1 - plan.save_share)
    return CheckpointStorage(
        save_bytes=size, device_bytes=of_device, saves=saves, kept=kept,
        room_bytes=size * min(kept + 1, saves), written_bytes=size * saves,
        write_bytes_per_second=size / (interval * (1 if config.asynchronous else stopped)),
        copy_bytes_per_second=of_device / (interval * stopped) if config.asynchronous else None,
    )  # fmt: skip


def data_volume(plan: PlanConfig, layout: Layout, tokens: float, tokens_per_second: float) -> DataVolume:
    """Args: tokens: of the run."""
    token_bytes = 2 if plan.model.vocab_size < WIDE_VOCABULARY else 4
    said, distinct = [source.tokens for source in plan.data.chosen.values()], plan.distinct_tokens
    if distinct is None and said and None not in said:
        distinct = sum(size for size in said if size is not None)
    return DataVolume(
        tokens=tokens, distinct_tokens=tokens if distinct is None else distinct, is_known=distinct is not None,
        token_bytes=token_bytes,
        read_bytes_per_second=token_bytes * tokens_per_second, rank_reads=layout.tp * layout.cp * layout.pp,
    )  # fmt: skip


def network(plan: PlanConfig, layout: Layout, step_seconds: float) -> Network:
    """Of the first node of the first, second and last stage and of the last node the one that sends most to others;
    ranks are placed node after node, so a node may hold several stages, and the last one may be partly filled."""
    size, world = min(plan.cluster.devices_per_node, layout.world_size), layout.world_size
    firsts = {rank // size * size for rank in (0, layout.stage_size % world, world - layout.stage_size, world - 1)}
    found = []
    for first in sorted(firsts):
        ranks = range(first, min(first + size, world))
        groups = _node_traffic(plan, layout, ranks, size)
        found.append(Network(node_ranks=len(ranks), groups=groups, step_seconds=step_seconds))
    return max(found, key=lambda node: node.leaving_bytes)


def _node_traffic(plan: PlanConfig, layout: Layout, ranks: range, node_size: int) -> dict[str, NodeTraffic]:
    """Of the ranks of one node, by group."""
    of_stage: dict[int, dict[str, float]] = {}
    sent, leaving = dict[str, float](), dict[str, float]()
    for rank in ranks:
        stage = rank // layout.stage_size
        if stage not in of_stage:
            of_stage[stage] = {
                group: sum(kinds.values()) for group, kinds in bytes_per_step(plan, layout, stage=stage).items()
            }
        for group, size in of_stage[stage].items():
            shares = (_routed_away(plan, layout, rank, node_size) if group == "ep"
                      else (1.0, _leaving(layout, group, rank, node_size)))  # fmt: skip
            sent[group] = sent.get(group, 0.0) + size * shares[0]
            leaving[group] = leaving.get(group, 0.0) + size * shares[1]
    return {group: NodeTraffic(sent_bytes=sent[group], leaving_bytes=leaving[group]) for group in sent}


def _leaving(layout: Layout, group: str, rank: int, node_size: int) -> float:
    """The share of what a rank sends in a group that goes to other nodes.

    pp: the neighbours before and after, with vpp around the ends too. Others but ep are rings in the order of the
    ranks, in which a rank sends to the next member.
    """
    members = layout.members(GROUPS[group], rank)
    if len(members) == 1:
        return 0.0
    place = members.index(rank)
    if group == "embedding":
        members, place = [members[0], members[-1]], int(rank == members[-1])
    places = [place + 1]
    if group == "pp":
        places = [at for at in (place - 1, place + 1) if layout.vpp > 1 or 0 <= at < len(members)]
    others = [members[at % len(members)] for at in places]
    return sum(other // node_size != rank // node_size for other in others) / len(others)


def _routed_away(plan: PlanConfig, layout: Layout, rank: int, node_size: int) -> tuple[float, float]:
    """Of an all-to-all in which a token goes to each of its experts: the share that is sent, and that goes to other
    nodes.

    A tuned dispatch (beyond.dispatch, or that of stack=) sends once to a rank, and what leaves an NVLink domain once to
    each domain, as layer_time.all_to_all_seconds has it. There the rank that gets it forwards it to those others of its
    domain that have an expert of it: a rank forwards as much as others forward of its own.
    """
    domain, others = plan.cluster.devices_per_nvlink_domain, [one for one in layout.members("ep", rank) if one != rank]
    beyond = [one for one in others if one // domain != rank // domain]
    near = far = 1.0
    forwarded = 0.0
    if efficiency_of(plan).is_tuned and plan.model.moe is not None:
        near = copies_kept(plan.model.moe.top_k, layout.ep)
        far = copies_kept(plan.model.moe.top_k, layout.ep * layout.etp / domain)
        inside = len(others) - len(beyond) + 1
        forwarded = near * len(beyond) * (1 - 1 / inside)  # of each row the rank that gets it may be the right one
    sent = near * (len(others) - len(beyond)) + far * len(beyond) + forwarded
    away = sum(far if one in beyond else near for one in others if one // node_size != rank // node_size)
    return sent / max(1, len(others)), away / max(1, len(others))


def carbon(plan: PlanConfig, kwh: float | None) -> Carbon | None:
    """Args: kwh: of devices and servers. None: the cluster's power is not known."""
    if kwh is None:
        return None
    hall, grid = kwh * plan.pue, plan.grid_kg_co2e_per_kwh
    return Carbon(kg_co2e=hall * grid, hall_kwh=hall, pue=plan.pue, grid_kg_co2e_per_kwh=grid)
