"""Asking Shardy where an op's operands lie: an op as opaque custom calls that Shardy propagates through.

Every operand passes through an identity call of its own, then all go into one call that carries the op's sharding rule.
After propagation each call's result tells a sharding, so the operands' are read off as well as the results'.
"""

import dataclasses
import math

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy, stablehlo
from jax.interpreters import mlir

from ringmoe import meshes
from ringmoe.rules import Dim, Rule

OPERAND, OP = "ringmoe.operand", "ringmoe.op"


@dataclasses.dataclass(frozen=True)
class Probe:
    """Stands in the parameter `placement` while the sharding is asked for; `number` tells calls apart."""

    number: int


def emit(probe: Probe, rule: Rule, operands, results):
    """The custom calls of one op: identity on each operand, then the op itself. `results`: abstract values.

    To the identities every dim is one factor: through a compound one Shardy carries no axis that its factors can't share.
    """
    marked = []
    for i, (x, dims) in enumerate(zip(operands, rule.operands)):
        plain = tuple((f"d{j}",) for j in range(len(dims)))
        lengths = {name: length for (name,), length in zip(plain, rule.shape(dims))}
        marked += _call(f"{probe.number}.{i}", OPERAND, [x], [x.type], (plain,), (plain,), lengths)
    result_types = [ir.RankedTensorType.get(aval.shape, mlir.dtype_to_ir_type(aval.dtype)) for aval in results]
    return _call(f"{probe.number}", OP, marked, result_types, rule.operands, rule.results, dict(rule.sizes))


def read(module: ir.Module) -> dict[tuple[int, int], meshes.Digits | None]:
    """(probe number, operand index) -> digits of each dim; results follow the operands, at index -1, -2, ..."""
    found: dict[tuple[int, int], meshes.Digits | None] = {}
    named = _meshes(module)

    def visit(op):
        if op.operation.name != "stablehlo.custom_call":
            return ir.WalkResult.ADVANCE
        target = ir.StringAttr(op.attributes["call_target_name"]).value
        if target in (OPERAND, OP) and "sdy.sharding" in op.attributes:
            number, _, operand = ir.StringAttr(op.attributes["backend_config"]).value.partition(".")
            shardings = sdy.TensorShardingPerValueAttr(op.attributes["sdy.sharding"]).shardings
            for i, sharding in enumerate(shardings):
                index = int(operand) if target == OPERAND else -1 - i
                found[int(number), index] = _digits(sdy.TensorShardingAttr(sharding), named)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def read_results(module: ir.Module) -> dict[int, meshes.Digits | None]:
    """Digits of each dim of the main function's results, those that have a sharding, by their number."""
    main = next(op for op in module.body.operations if "sym_name" in op.attributes and _name(op) == "main")
    results = (ir.DictAttr(attrs) for attrs in ir.ArrayAttr(main.attributes["res_attrs"]))
    named, key = _meshes(module), "sdy.sharding"
    return {i: _digits(sdy.TensorShardingAttr(attrs[key]), named) for i, attrs in enumerate(results) if key in attrs}


def _meshes(module: ir.Module):
    meshes_ = (op for op in module.body.operations if op.operation.name == "sdy.mesh")
    return {_name(op): sdy.MeshAttr(op.attributes["mesh"]) for op in meshes_}


def _name(op) -> str:
    return ir.StringAttr(op.attributes["sym_name"]).value


def _digits(sharding, named) -> meshes.Digits | None:
    """The digits of each dim: an axis's, or a part's, since Shardy splits an axis where a reshape does."""
    mesh = sharding.mesh_or_ref
    mesh = named[ir.FlatSymbolRefAttr(mesh).value] if isinstance(mesh, ir.FlatSymbolRefAttr) else sdy.MeshAttr(mesh)
    axes = [sdy.MeshAxisAttr(axis) for axis in mesh.axes]
    sizes = {axis.name: axis.size for axis in axes}
    if not sizes:  # the empty mesh
        return ((),) * len(sharding.dimension_shardings)
    if list(mesh.device_ids) in ([], list(range(math.prod(sizes.values())))):
        digits = {axis: (digit,) for axis, digit in meshes.of_mesh(sizes).items()}
    else:
        tiles = meshes.of_tiles(np.array(mesh.device_ids).reshape(list(sizes.values())))
        if tiles is None:
            return None
        digits = dict(zip(sizes, tiles))

    def of_axis(ref) -> tuple[meshes.Digit, ...] | None:
        if ref.sub_axis_info is None:
            return digits[ref.name]
        if len(digits[ref.name]) != 1:
            return None
        ((size, stride),), part = digits[ref.name], sdy.SubAxisInfoAttr(ref.sub_axis_info)
        return ((part.size, stride * size // (part.pre_size * part.size)),)

    told = []
    for dim in sharding.dimension_shardings:
        parts = [of_axis(sdy.AxisRefAttr(axis)) for axis in sdy.DimensionShardingAttr(dim).axes]
        if None in parts:
            return None
        told.append(tuple(digit for part in parts if part for digit in part if digit[0] > 1))
    return tuple(told)


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
