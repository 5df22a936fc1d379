"""What a run needs beside its devices, as rows of a plan's tables and page: storage, data, network, carbon.

planner.upkeep.Upkeep -> (what, number, unit)
"""

from html import escape

from rich.table import Table

from gpt4moe.pages.plan_page import with_range
from gpt4moe.planner.estimate import Estimate
from gpt4moe.planner.upkeep import CheckpointStorage, DataVolume, Network

UPKEEP_TITLE = "What the run needs beside its devices"
UPKEEP_COLUMNS = ("what", "number", "unit")
Row = tuple[str, str, str]


def upkeep_rows(result: Estimate) -> list[Row]:
    """UPKEEP_COLUMNS of each need."""
    found = result.upkeep
    rows = [
        *_storage(found.checkpoints, result.layout.world_size, result.plan.save_share),
        *_data(found.data),
        *_network(found.network, result.plan.cluster.fabric_bytes_per_second),
    ]
    if found.carbon is None:
        return [*rows, ("carbon", "not known: cluster.watts=...", "t CO2e")]
    tons, share = found.carbon.kg_co2e / 1000, f"{found.carbon.grid_kg_co2e_per_kwh:g} kg a kWh"
    hall = with_range(f"{found.carbon.hall_kwh:,.4g}", result.likely(found.carbon.hall_kwh), ",.4g")
    return [
        *rows,
        (f"energy, with the hall (pue={found.carbon.pue:g}, assumed)", hall, "kWh"),
        (f"carbon of it ({share}, assumed)", with_range(f"{tons:,.4g}", result.likely(tons), ",.4g"), "t CO2e"),
    ]


def upkeep_table(result: Estimate) -> Table:
    table = Table(title=UPKEEP_TITLE, title_justify="left")
    for index, column in enumerate(UPKEEP_COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for row in upkeep_rows(result):
        table.add_row(*row)
    return table


def upkeep_section(result: Estimate) -> str:
    """HTML: the same as a table."""
    head = "".join(f"<th>{escape(column)}</th>" for column in UPKEEP_COLUMNS)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in upkeep_rows(result))
    return f'<div class="table"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _storage(storage: CheckpointStorage, devices: int, share: float) -> list[Row]:
    write, copy = storage.write_bytes_per_second, storage.copy_bytes_per_second
    until = f"a save costs {share:.2g} of the time" if copy is None else "a save is written before the next is due"
    rows = [
        ("a checkpoint", f"{storage.save_bytes / 1e12:,.4g}", "TB"),
        (
            f"room: {storage.kept} kept{', one being written' * (storage.saves > storage.kept)}",
            f"{storage.room_bytes / 1e12:,.4g}",
            "TB",
        ),
        (f"written by {storage.saves:,} saves", f"{storage.written_bytes / 1e12:,.4g}", "TB"),
        (f"write rate, so that {until}", f"{write / 1e9:,.3g}", "GB/s"),
        ("... of a device", f"{write / devices / 1e6:,.3g}", "MB/s"),
    ]
    if copy is not None:
        rows.append((f"device to host, so that a save costs {share:.2g} of the time", f"{copy / 1e9:,.3g}", "GB/s"))
    return rows


def _data(data: DataVolume) -> list[Row]:
    read = data.read_bytes_per_second
    return [
        (f"text on disk, {data.distinct_tokens:.3g} tokens of {data.token_bytes} bytes"
         f"{'' if data.is_known else ', if each is read once'}",
         f"{data.disk_bytes / 1e9:,.4g}", "GB"),
        ("text read, each sample once", f"{read / 1e6:,.3g}", "MB/s"),
        (f"... by each of the {data.rank_reads} ranks of its replica", f"{read * data.rank_reads / 1e6:,.3g}", "MB/s"),
    ]  # fmt: skip


def _network(network: Network, fabric: float) -> list[Row]:
    rows = [
        (f"a node of {network.node_ranks} sends in a step: {group}, of it to other nodes",
         f"{traffic.sent_bytes / 1e9:,.4g}, {traffic.leaving_bytes / 1e9:,.4g}", "GB")
        for group, traffic in network.groups.items()
    ]  # fmt: skip
    mean = f"{network.device_bytes_per_second / 1e9:,.3g} of {fabric / 1e9:g}"
    return [*rows, ("to other nodes, of each device, mean of a step, of what its port has", mean, "GB/s")]
