"""What joins devices: how many have fast links to each other, the network between such groups, and latencies.

TPU slices are joined by the data-centre network, GPUs behind one NVSwitch by InfiniBand or RoCE. A slice, or the GPUs
behind one switch, is called a domain here.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

_GBIT = 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way of moving the data of a collective: microseconds once, for each step over a fast link, and for each step
    over the network; and the part of the bandwidth that it reaches."""

    launch_us: float
    link_us: float
    network_us: float
    share: float


@dataclasses.dataclass(frozen=True)
class Network:
    """What one kind of chip is joined by. `sources` says where each figure comes from.

    Attributes:
      domain: chips behind one switch; 0 is all of a slice or host.
      bandwidth: bytes/s of one chip into the network between domains, one way.
      link_share: the part of the links' bandwidth that collectives reach when messages are large.
      protocols: the ways to move data; the fastest for the message is taken.
    """

    domain: int
    bandwidth: float
    link_share: float
    protocols: tuple[Protocol, ...]
    sources: Mapping[str, str]


def _tpu(gbit: float, page: str) -> Network:
    sources = {
        "domain": "a slice, by its name",
        "network_bandwidth": page,
        "link_share": "taken as 1: the documented bandwidth",
        "protocols": "about 1 us a hop: How to Scale Your Model (jax-ml.github.io/scaling-book), sharding; 50 us between "
        "slices: tail of short messages in Google's data centres, Kumar et al., Swift, SIGCOMM 2020",
    }
    return Network(0, gbit * _GBIT, 1.0, (Protocol(0.0, 1.0, 50.0, 1.0),), MappingProxyType(sources))


def _gpu(domain: int, gbit: float, link_share: float, system: str) -> Network:
    sources = {
        "domain": f"{system}: GPUs behind one NVSwitch",
        "network_bandwidth": f"{system}: one {gbit:.0f} Gb/s ConnectX-7 a GPU",
        "link_share": "NCCL's figure for one NVLink of this generation over the data sheet's; no in-network reduction",
        "protocols": "NCCL's tuning constants for rings and trees (LL, LL128, Simple), src/graph/tuning.cc",
    }
    protocols = (Protocol(6.6, 0.6, 5.0, 0.5), Protocol(14.0, 1.9, 8.5, 0.92), Protocol(8.4, 3.4, 14.0, 1.0))
    return Network(domain, gbit * _GBIT, link_share, protocols, MappingProxyType(sources))


_TABLE = "Google Cloud TPU documentation, {}, data centre network bandwidth"
NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "v4": _tpu(50, "How to Scale Your Model (jax-ml.github.io/scaling-book), tpus: 25 GB/s a host, of four chips"),
        "v5e": _tpu(25, _TABLE.format("TPU v5e") + " per pod / 256 chips"),
        "v5p": _tpu(50, _TABLE.format("TPU v5p") + " per chip"),
        "v6e": _tpu(100, _TABLE.format("TPU v6e") + " per pod / 256 chips"),
        "tpu7x": _tpu(100, _TABLE.format("TPU7x") + " per chip"),
        "h100": _gpu(8, 400, 20.6 / 25, "NVIDIA DGX H100"),
        "h200": _gpu(8, 400, 20.6 / 25, "NVIDIA DGX H200"),
        "b200": _gpu(8, 400, 40.1 / 50, "NVIDIA DGX B200"),
        "gb200": _gpu(72, 400, 40.1 / 50, "NVIDIA GB200 NVL72"),
        "cpu": Network(
            0,
            10 * _GBIT,
            1.0,
            (Protocol(0.0, 1.0, 50.0, 1.0),),
            MappingProxyType(
                dict.fromkeys(
                    ("domain", "network_bandwidth", "link_share", "protocols"),
                    "nominal small host, to read schedules by; not a measurement of this machine",
                )
            ),
        ),
    }
)
