"""Asking Shardy where an op's operands lie: an op as opaque custom calls that Shardy propagates through.

Every operand passes through an identity call of its own, then all go into one call that carries the op's sharding rule.
After propagation each call's result tells a sharding, so the operands' are read off as well as the results'.
"""

import dataclasses

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy, stablehlo
from jax.interpreters import mlir

from ringmoe.rules import Axes, Dim, Rule

OPERAND, OP = "ringmoe.operand", "ringmoe.op"


@dataclasses.dataclass(frozen=True)
class Probe:
    """Stands in the parameter `placement` while the sharding is asked for; `number` tells calls apart."""

    number: int


def emit(probe: Probe, rule: Rule, operands, results):
    """The custom calls of one op: identity on each operand, then the op itself. `results`: abstract values."""
    sizes = dict(rule.sizes)
    marked = [
        _call(f"{probe.number}.{i}", OPERAND, [x], [x.type], (dims,), (dims,), sizes)[0]
        for i, (x, dims) in enumerate(zip(operands, rule.operands))
    ]
    result_types = [ir.RankedTensorType.get(aval.shape, mlir.dtype_to_ir_type(aval.dtype)) for aval in results]
    return _call(f"{probe.number}", OP, marked, result_types, rule.operands, rule.results, sizes)


def read(module: ir.Module) -> dict[tuple[int, int], tuple[Axes, ...]]:
    """(probe number, operand index) -> axes of each dim; results follow the operands, at index -1, -2, ..."""
    found: dict[tuple[int, int], tuple[Axes, ...]] = {}

    def visit(op):
        if op.operation.name != "stablehlo.custom_call":
            return ir.WalkResult.ADVANCE
        target = ir.StringAttr(op.attributes["call_target_name"]).value
        if target in (OPERAND, OP) and "sdy.sharding" in op.attributes:
            number, _, operand = ir.StringAttr(op.attributes["backend_config"]).value.partition(".")
            shardings = sdy.TensorShardingPerValueAttr(op.attributes["sdy.sharding"]).shardings
            for i, sharding in enumerate(shardings):
                index = int(operand) if target == OPERAND else -1 - i
                found[int(number), index] = _axes(sdy.TensorShardingAttr(sharding))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _axes(sharding) -> tuple[Axes, ...]:
    """Axes of each dim. A part of an axis (Shardy can split one) is left out: no mesh axis of ours stands for it."""
    dims = (sdy.DimensionShardingAttr(dim) for dim in sharding.dimension_shardings)
    refs = ([sdy.AxisRefAttr(axis) for axis in dim.axes] for dim in dims)
    return tuple(tuple(ref.name for ref in axes if ref.sub_axis_info is None) for axes in refs)


def _call(name, target, operands, result_types, operand_dims, result_dims, sizes: dict[str, int]):
    call = stablehlo.CustomCallOp(
        result_types,
        operands,
        call_target_name=ir.StringAttr.get(target),
        has_side_effect=ir.BoolAttr.get(False),
        api_version=mlir.i32_attr(2),
        called_computations=ir.ArrayAttr.get([]),
        backend_config=ir.StringAttr.get(name),
    )
    call.attributes["sdy.sharding_rule"] = _rule_attribute(operand_dims, result_dims, sizes)
    return list(call.results)


def _rule_attribute(operands: tuple[tuple[Dim, ...], ...], results: tuple[tuple[Dim, ...], ...], sizes: dict[str, int]):
    factors = list(dict.fromkeys(f for dims in operands + results for dim in dims for f in dim))
    index = {factor: i for i, factor in enumerate(factors)}

    def mapping(dims):
        return sdy.TensorMappingAttr.get(
            dim_mappings=[sdy.DimMappingAttr.get(factor_indices=[index[f] for f in dim]) for dim in dims]
        )

    return sdy.OpShardingRuleAttr.get(
        factor_sizes=[sizes.get(f, 1) for f in factors],
        operand_mappings=[mapping(dims) for dims in operands],
        result_mappings=[mapping(dims) for dims in results],
        is_custom=True,
    )
