"""Plans: frozen, hashable data without arrays that says which exchange an op uses, and why."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """How one expert layer is spread over a mesh.

    Three kinds of axes shard experts or their hidden dim:
    an exchange axis shards experts and tokens: rows travel to their experts and back by all-to-all;
    an expert axis that doesn't shard tokens: every device serves its own experts, the outputs are summed;
    a hidden axis shards F: every device computes its part of every row, the outputs are summed.

    Attributes:
        num_experts: E.
        capacity: C, slots per group and expert.
        group_size: i, consecutive tokens per group; a device holds whole groups.
        expert_axes: (axis, size) of the axes that shard E, major to minor; the product of sizes divides E.
        exchange_axes: those of them that also shard tokens, in the order of expert_axes.
        token_axes: all axes that shard tokens (batch or sequence).
        hidden_axes: axes that shard F; neither token nor expert axes.
        reason: why this plan, in words, for `explain`.
    """

    num_experts: int
    capacity: int
    group_size: int
    expert_axes: tuple[tuple[str, int], ...] = ()
    exchange_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    hidden_axes: tuple[str, ...] = ()
    reason: str = ""

    def __post_init__(self):
        experts = [axis for axis, _ in self.expert_axes]
        assert self.num_experts % math.prod(size for _, size in self.expert_axes) == 0, self
        assert list(self.exchange_axes) == [axis for axis in experts if axis in self.token_axes], self
        assert not set(self.hidden_axes) & {*experts, *self.token_axes}, self

    @property
    def sum_axes(self) -> tuple[str, ...]:
        """Axes over which outputs (and dx, dweight) are summed: expert axes without exchange, and hidden axes."""
        own = (axis for axis, _ in self.expert_axes if axis not in self.exchange_axes)
        return (*own, *self.hidden_axes)

    @property
    def weight_sum_axes(self) -> tuple[str, ...]:
        """Axes over which weight gradients are summed: token axes that don't exchange, so each saw its own tokens only."""
        return tuple(axis for axis in self.token_axes if axis not in self.exchange_axes)

    @property
    def num_exchange(self) -> int:
        """Devices among which one device's rows are exchanged."""
        return math.prod(size for axis, size in self.expert_axes if axis in self.exchange_axes)
