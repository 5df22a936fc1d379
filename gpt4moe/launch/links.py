"""What the cluster's figures promise a group of ranks. No torch.

A bus bandwidth is a link's, whatever the number of ranks (nccl-tests, doc/PERFORMANCE.md): the bytes that a rank must
send, over the time. Of n ranks it must send 2(n-1)/n of an all-reduced buffer, (n-1)/n of an all-to-all's, all of a
message.
"""

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.planner.efficiency import ALL_TO_ALL_SHARE, RING_SHARE


def bus_bytes(operation: str, size_bytes: float, num_ranks: int) -> float:
    """What each of the ranks sends."""
    shares = {"all_reduce": 2 * (num_ranks - 1) / num_ranks, "all_to_all": (num_ranks - 1) / num_ranks, "send": 1.0}
    return shares[operation] * size_bytes


def promised_rate(cluster: ClusterConfig, operation: str, hosts: list[str]) -> float:
    """Bus bandwidth that the planner counts with, bytes per second.

    Args:
        hosts: the node of each member. Members of one node, or fewer than an NVLink domain holds, use NVLink.

    Between nodes every rank has its share of the ports. Rings use the ports of all members of a node at once, so
    members side by side on a node make the bus as fast as their ports together; an all-to-all sends only what is for
    other nodes through them.
    """
    num_ranks = len(hosts)
    share = ALL_TO_ALL_SHARE if operation == "all_to_all" else RING_SHARE
    inside, outside = cluster.nvlink_bytes_per_second, cluster.fabric_bytes_per_second
    is_domain = cluster.devices_per_nvlink_domain > cluster.devices_per_node
    if len(set(hosts)) == 1 or (is_domain and num_ranks <= cluster.devices_per_nvlink_domain):
        return share * inside
    together = min(hosts.count(host) for host in set(hosts))
    if operation == "all_reduce":
        return share * min(inside, together * outside)
    if operation == "all_to_all":
        return share * min(inside, outside * (num_ranks - 1) / (num_ranks - together))
    return share * outside
