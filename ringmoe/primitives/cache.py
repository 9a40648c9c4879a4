"""The primitive that writes new tokens into a cache."""

from ringmoe.plan.base import freeze
from ringmoe.plan.cache import CachePlan
from ringmoe.primitives.op import Op
from ringmoe.schedule import cache as schedule


def update(cache, new, first, *pages, axis_name: tuple[str, ...] = ()):
    """The cache [*batch, S, K, H] with new [*batch, T, K, H] from the places first [*batch] on; or a pool, by its pages."""
    operands = ("cache", "new", "first", *["pages"] * len(pages))
    params = dict(operands=operands, results=("cache",), sizes=(), implementation=None, spec=None)
    return UPDATE.bind(cache, new, first, *pages, axis_name=axis_name, **params)[0]


def _plan(rule, factors, mesh, avals, params) -> CachePlan:
    if "pages" in params["operands"]:  # whoever holds a page, of all sequences, has all that is new
        factors = {f: axes for f, axes in factors.items() if f in ("s", "k") or f.startswith("m")}
    return CachePlan(freeze(factors), factors.get("s", ()))


def _body(plan: CachePlan, platform: str, params):
    return lambda *arrays: [schedule.update(plan.key_axes, *arrays)]


UPDATE = Op("update_cache", "cache", _plan, _body)
UPDATE.derive(UPDATE.differentiate_plainly)
