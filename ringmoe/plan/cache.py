"""How a cache's update is spread over a mesh: it stays where it is."""

import dataclasses

from ringmoe.meshes import Axes
from ringmoe.plan.base import Factors


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Every device writes what falls into its own part of the sequence, and nothing is sent."""

    factors: Factors
    key_axes: Axes  # mesh axes that cut the cache's sequence
    exchange: str = "local"
    axes: Axes = ()
    reason: str = "every device writes the new tokens that fall into its own part"
    wire_bytes: int = 0
