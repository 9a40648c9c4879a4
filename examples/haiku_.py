"""Haiku: a byte model with experts, its sequence sharded over a mesh.

Lines between `# [ringmoe]` and `# [/ringmoe]` are RingMoE's; `# was:` tells the line of the ordinary program.
With Explicit axes (`jax.make_mesh`'s default, and `jax.set_mesh`) `jax.jit` stays.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/haiku_.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# [ringmoe]
# was: from dense import experts
import ringmoe

# [/ringmoe]

VOCABULARY, DIM, HEADS, HIDDEN, EXPERTS = 256, 256, 2, 256, 8
optimizer = optax.sgd(0.1, momentum=0.9)


class Block(hk.Module):
    def __call__(self, x):
        heads = (*x.shape[:-1], HEADS, DIM // HEADS)
        y = hk.LayerNorm(-1, True, True)(x)
        q, k, v = (hk.Linear(DIM, with_bias=False, name=name)(y).reshape(heads) for name in ("query", "key", "value"))
        # [ringmoe]
        # was: attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        attended = ringmoe.dot_product_attention(q, k, v, is_causal=True)
        # [/ringmoe]
        x = x + hk.Linear(DIM, with_bias=False, name="out")(attended.reshape(x.shape))
        normal = hk.initializers.RandomNormal(0.06)
        weights = (
            hk.get_parameter("router", (DIM, EXPERTS), init=normal),
            hk.get_parameter("experts_in", (EXPERTS, DIM, HIDDEN), init=normal),
            hk.get_parameter("experts_out", (EXPERTS, HIDDEN, DIM), init=normal),
        )
        y = hk.LayerNorm(-1, True, True)(x)
        # [ringmoe]
        # was: y = experts(y, *weights)
        y, _ = ringmoe.moe_ffn(y, *weights, config=ringmoe.RouterConfig(EXPERTS, capacity_factor=None, group_size=32))
        # [/ringmoe]
        return x + y


@hk.without_apply_rng
@hk.transform
def model(tokens):
    x = hk.Linear(DIM, with_bias=False, name="embed")(jax.nn.one_hot(tokens, VOCABULARY))
    x = hk.LayerNorm(-1, True, True)(Block()(x))
    return hk.Linear(VOCABULARY, with_bias=False, name="logits")(x)


def init(key):
    """Parameters and the optimiser's state."""
    params = model.init(key, jnp.zeros((1, 32), int))
    return params, optimizer.init(params)


# [ringmoe]
# was: @jax.jit
@ringmoe.jit
# [/ringmoe]
def step(state, tokens, targets):
    """One step of training: `(state, loss)`."""
    params, opt_state = state

    def loss_fn(params):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), loss


def shardings(state, mesh):
    """Experts over the devices of a sequence; all else on every device."""
    spec = lambda path: P("seq") if "experts" in jax.tree_util.keystr(path) else P()
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, spec(path)), state)


def main():
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    state = jax.jit(init)(jax.random.key(0))
    state = jax.device_put(state, shardings(state, mesh))
    text = jax.random.randint(jax.random.key(1), (4, 129), 0, VOCABULARY)
    tokens, targets = jax.device_put((text[:, :-1], text[:, 1:]), NamedSharding(mesh, P("data", "seq")))
    for _ in range(3):
        state, loss = step(state, tokens, targets)
        print(loss)


if __name__ == "__main__":
    main()
