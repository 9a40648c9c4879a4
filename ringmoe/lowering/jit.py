"""`ringmoe.jit`: jax.jit, with every RingMoE op partitioned by the sharding that Shardy finds for its operands.

    trace (jax.jit) ─► propagate ─► jax.jit of the placed jaxpr: lower, compile, run

What comes out is an ordinary jitted function of shard_maps: it runs on every platform, exports, and caches on disk.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.core
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from ringmoe import compat, meshes
from ringmoe.errors import check
from ringmoe.lowering import propagate, rows, walk
from ringmoe.plan import cost
from ringmoe.primitives.op import OPS

# What besides the arguments decides how a function is traced.
CONTEXT = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
    "jax_default_prng_impl", "jax_threefry_partitionable", "jax_debug_nans", "jax_debug_infs",
)  # fmt: skip


# By what a machine is, for programs with which ops, the options that let its compiler hide their exchanges. XLA:GPU has one
# permute under way at a time, and so hid one of the four arrays that leave together in a ring's gradient.
HIDING = {
    "tpu": ("experts", {"xla_tpu_enable_async_all_to_all": "true"}),
    "gpu": ("attention", {"xla_gpu_experimental_parallel_collective_overlap_limit": "4"}),
}


class Jitted[**P, R]:
    """What `ringmoe.jit` returns: call it, or take it apart with `trace`, `lower(...).compile()`, `explain`."""

    def __init__(self, fun: Callable[P, R], options: dict[str, Any]):
        functools.update_wrapper(self, fun)
        self._options = options
        self._fun = _refusing_lost_changes(fun)
        self._plain: Any = jax.jit(self._fun, **options)
        self._static = _static_arguments(fun, options)
        self._placed: dict[Any, Any] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs)))
        known = self._known(args, kwargs) if traced else (args, kwargs)
        if known is None or jax.config.jax_disable_jit:
            return self._plain(*args, **kwargs)  # inside another jit: the outermost ringmoe.jit places the ops
        # A gradient taken outside keeps values of the forward pass: results whose shardings JAX has to name.
        return self._for(*known, parts=not traced)(*args, **kwargs)

    def _known(self, args, kwargs):
        """`(args, kwargs)` with something that has a sharding in place of tracers; None where an outer jit hides it.

        Under an eager jax.grad the tracers stand for arrays that are there: their shardings place the ops, and a placed
        op's derivatives are placed as it is. With `in_shardings` the arguments need not tell.
        """
        leaves, tree = jax.tree.flatten((args, kwargs))
        leaves = [x if (array := compat.concrete(x)) is None else array for x in leaves]
        if self._options.get("in_shardings") is not None:
            bare = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type)
            leaves = [bare(jax.typeof(x)) if isinstance(x, jax.core.Tracer) else x for x in leaves]
        hidden = any(isinstance(x, jax.core.Tracer) for x in leaves)
        return None if hidden else jax.tree.unflatten(tree, leaves)

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        """As jax.jit's: arguments may be `jax.ShapeDtypeStruct`s with shardings, of devices that aren't here."""
        return self._for(args, kwargs).lower(*args, **kwargs)

    def trace(self, *args, **kwargs) -> jax.stages.Traced:
        """As jax.jit's; its jaxpr shows each op with its `placement`."""
        return self._for(args, kwargs).trace(*args, **kwargs)

    def eval_shape(self, *args, **kwargs):
        """As jax.jit's."""
        return self._plain.eval_shape(*args, **kwargs)

    def clear_cache(self) -> None:
        """As jax.jit's."""
        self._placed.clear()
        self._plain.clear_cache()

    def _for(self, args, kwargs, parts=True):
        """The jitted function for arguments of these shapes and shardings."""
        numbers, names = self._static
        static = [args[i] for i in numbers if i < len(args)], [kwargs[n] for n in names if n in kwargs]
        dynamic = (
            [x for i, x in enumerate(args) if i not in numbers],
            {n: x for n, x in kwargs.items() if n not in names},
        )
        leaves, tree = jax.tree.flatten(dynamic)
        context = jax.sharding.get_abstract_mesh(), *(getattr(jax.config, name) for name in CONTEXT)
        key = tree, tuple(map(_signature, leaves)), *map(tuple, static), context, parts
        try:
            if key not in self._placed:
                self._placed[key] = self._place(leaves, args, kwargs, parts)
                rows.log(self._placed[key], args, kwargs)
            return self._placed[key]
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            return self._plain  # jax.jit says which argument can't be hashed

    def _place(self, leaves, args, kwargs, parts):
        traced = self._plain.trace(*args, **kwargs)
        found = _mesh_of(leaves, self._options)
        if found.size <= 1:
            return self._plain
        mesh, slices = found.abstract_mesh, meshes.slices(found)
        options = self._options | _overlap(mesh, traced.jaxpr, self._options)
        if not propagate.needs(traced.jaxpr):
            return self._plain if options == self._options else jax.jit(self._fun, **options)
        run = functools.partial(self._evaluate, options=options, tree=jax.tree.structure(traced.out_info))
        lower = lambda jaxpr: run(jaxpr).lower(*args, **kwargs)
        jaxpr, specs = propagate.propagate(traced.jaxpr, mesh, lower, parts, slices)
        free = {} if self._options.get("out_shardings") is not None else specs
        return run(jaxpr, {i: NamedSharding(mesh, spec) for i, spec in free.items()})

    def _evaluate(self, jaxpr, shardings=None, *, options, tree):
        """A jitted function that evaluates `jaxpr`: jax.jit with the caller's options hands it the same arguments.

        `shardings`: constraints on some of its results.
        """

        def placed(*args, **kwargs):
            # Static arguments stand among the leaves too: only the traced ones are the jaxpr's.
            leaves = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.core.Tracer)]
            results = jaxpr_as_fun(jaxpr)(*leaves)
            for i, sharding in (shardings or {}).items():
                results[i] = jax.lax.with_sharding_constraint(results[i], sharding)
            return jax.tree.unflatten(tree, results)

        return jax.jit(functools.update_wrapper(placed, self), **options)  # its name and signature are fun's


@overload
def jit[**P, R](fun: Callable[P, R], **options: Any) -> Jitted[P, R]: ...
@overload
def jit[**P, R](**options: Any) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...
def jit(fun: Callable | None = None, **options) -> Any:
    """Jits `fun` as `jax.jit` does, and partitions every RingMoE op in it by the sharding of its operands.

    Takes what `jax.jit` takes (static_argnums, static_argnames, donate_argnums, donate_argnames, in_shardings,
    out_shardings, ...) and is called, lowered and compiled like it. Needed on TPU when mesh axes are Auto; never wrong
    elsewhere. `jax.grad(ringmoe.jit(f))` is placed too, forward and backward. Called inside another jit (or `jax.vmap`) it
    is a plain nested jit, unless it was given `in_shardings`: the arguments' shardings are hidden there. So it should be
    the outermost transformation: `ringmoe.jit(jax.vmap(f))`, `ringmoe.jit(train_step)`.

    On TPUs that can hide an all-to-all, a program with experts is compiled with `xla_tpu_enable_async_all_to_all`; on GPUs one
    with attention with `xla_gpu_experimental_parallel_collective_overlap_limit` 4, so that all that leaves a ring's device
    together is under way at once. `compiler_options` go first.

    Cost: one more lowering and one run of Shardy's propagation for each new set of shapes and shardings.
    Source: Shardy, https://github.com/openxla/shardy.
    """
    if fun is None:
        return functools.partial(jit, **options)
    return Jitted(fun, options)


def _overlap(mesh: AbstractMesh, jaxpr, options) -> dict[str, Any]:
    """The options of HIDING, where the machine can and there may be something to hide; the caller's go first."""
    kind = meshes.device_kind(mesh)
    family, hiding = HIDING.get(cost.family(kind), ("", {}))
    if cost.machine(kind).is_limited(mesh.size) or all(OPS[eqn.primitive].family != family for eqn in walk.ops(jaxpr)):
        return {}
    return {"compiler_options": hiding | (options.get("compiler_options") or {})}


def _refusing_lost_changes(fun: Callable) -> Callable:
    """`fun`, refusing to be traced where it changes an object among its arguments and the change would be lost.

    A jitted function gets copies of its arguments: an nnx model that was trained inside comes back untrained. Dicts and
    lists may be scratch space; the leaves of any other node are state.
    """

    @functools.wraps(fun)
    def traced(*args, **kwargs):
        before = jax.tree.leaves((args, kwargs))
        results = fun(*args, **kwargs)
        kept = {id(x) for x in (*before, *jax.tree.leaves(results))}
        plain = jax.tree_util.DictKey, jax.tree_util.SequenceKey
        for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
            check(
                id(leaf) in kept
                or all(isinstance(key, plain) for key in path)
                or not isinstance(leaf, jax.core.Tracer),
                f"{getattr(fun, '__name__', fun)} changes {jax.tree_util.keystr(path[1:])} of its arguments in place and "
                "doesn't return it, so the change would be lost: a jitted function works on copies. Return the state: "
                "graphdef, state = nnx.split((model, optimizer)) outside; model, optimizer = nnx.merge(graphdef, state) "
                "inside, and nnx.state((model, optimizer)) among the results",
            )
        return results

    return traced


def _static_arguments(fun: Callable, options: dict[str, Any]) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the static arguments; as in jax.jit, either may be given for both."""
    listed: Any = lambda value: () if value is None else (value,) if isinstance(value, (int, str)) else tuple(value)
    numbers: set[int] = set(listed(options.get("static_argnums")))
    names: set[str] = set(listed(options.get("static_argnames")))
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    try:
        positional = [p.name for p in inspect.signature(fun).parameters.values() if p.kind in kinds]
    except (ValueError, TypeError):  # a callable without a signature: what was given is all there is
        positional = []
    numbers = {i % len(positional) if i < 0 and positional else i for i in numbers}
    names |= {positional[i] for i in numbers if i < len(positional)}
    numbers |= {i for i, name in enumerate(positional) if name in names}
    return frozenset(numbers), frozenset(names)


def _signature(leaf):
    """What of an argument decides the placement: type and sharding."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return (
            leaf.shape,
            leaf.dtype,
            getattr(leaf, "weak_type", False),
            leaf.sharding,
            getattr(leaf, "committed", True),
        )
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else type(leaf)


def _mesh_of(leaves, options) -> Mesh | AbstractMesh:
    """The mesh of the arguments, of in_shardings, or the one that is set: with its devices, where these are told."""
    given = jax.tree.leaves([options.get("in_shardings"), options.get("out_shardings")])
    for sharding in [getattr(x, "sharding", None) for x in leaves] + given:
        if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    return compat.with_its_devices(jax.sharding.get_abstract_mesh())
