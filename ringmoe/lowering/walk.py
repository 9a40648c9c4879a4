"""Walking a jaxpr and everything nested in it: the RingMoE ops, in one fixed order."""

from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn

from ringmoe.primitives.op import OPS


def map_ops(jaxpr: Jaxpr, place: Callable[[JaxprEqn], Any], outer=None) -> Jaxpr:
    """`jaxpr` with each op's `placement` set to `place(eqn)`, in nested jaxprs too.

    Every nested jaxpr is a new object, so two calls of one jitted function can be placed apart. A nested jaxpr's source
    lines may begin inside ringmoe: an op without a line of the caller gets that of the equation around it, `outer`.
    """
    source = lambda eqn: eqn.source_info if outer is None or source_info_util.summarize(eqn.source_info) else outer
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive in OPS:
            eqn = eqn.replace(source_info=source(eqn))
            eqn = eqn.replace(params=eqn.params | {"placement": place(eqn)})
        else:
            inner = {
                name: _map_param(value, place, source(eqn)) for name, value in eqn.params.items() if _holds_jaxpr(value)
            }
            eqn = eqn.replace(params=eqn.params | inner) if inner else eqn
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)


def ops(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The ops in the order of `map_ops`."""
    found: list[JaxprEqn] = []
    map_ops(jaxpr, lambda eqn: found.append(eqn))
    return iter(found)


def _holds_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr) or (isinstance(value, (tuple, list)) and any(map(_holds_jaxpr, value)))


def _map_param(value: Any, place: Callable[[JaxprEqn], Any], outer) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map_param(v, place, outer) for v in value)
    return map_ops(value, place, outer) if isinstance(value, Jaxpr) else value
