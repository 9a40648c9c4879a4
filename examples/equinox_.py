"""Equinox: a byte model with experts, its sequence sharded over a mesh.

Lines between `# [ringmoe]` and `# [/ringmoe]` are RingMoE's; `# was:` tells the line of the ordinary program.
`ringmoe.jit` stands outside, `eqx.filter_jit` inside. With Explicit axes (`jax.make_mesh`'s default, and
`jax.set_mesh`) `eqx.filter_jit` alone is enough.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/equinox_.py
"""

import equinox as eqx
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


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    router: jax.Array
    experts_in: jax.Array
    experts_out: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(DIM), eqx.nn.LayerNorm(DIM)
        self.qkv = eqx.nn.Linear(DIM, 3 * DIM, use_bias=False, key=keys[0])
        self.out = eqx.nn.Linear(DIM, DIM, use_bias=False, key=keys[1])
        self.router = 0.06 * jax.random.normal(keys[2], (DIM, EXPERTS))
        self.experts_in = 0.06 * jax.random.normal(keys[3], (EXPERTS, DIM, HIDDEN))
        self.experts_out = 0.06 * jax.random.normal(keys[4], (EXPERTS, HIDDEN, DIM))

    def __call__(self, x):
        """One sequence [T, D]."""
        qkv = jax.vmap(self.qkv)(jax.vmap(self.norm1)(x))
        q, k, v = (y.reshape(-1, HEADS, DIM // HEADS) for y in jnp.split(qkv, 3, -1))
        # [ringmoe]
        # was: attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        attended = ringmoe.dot_product_attention(q, k, v, is_causal=True)
        # [/ringmoe]
        x = x + jax.vmap(self.out)(attended.reshape(x.shape))
        y = jax.vmap(self.norm2)(x)
        weights = self.router, self.experts_in, self.experts_out
        # [ringmoe]
        # was: y = experts(y, *weights)
        y, _ = ringmoe.moe_ffn(y, *weights, config=ringmoe.RouterConfig(EXPERTS, capacity_factor=None, group_size=32))
        # [/ringmoe]
        return x + y


class Model(eqx.Module):
    embed: eqx.nn.Linear
    block: Block
    norm: eqx.nn.LayerNorm
    logits: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(VOCABULARY, DIM, use_bias=False, key=keys[0])
        self.block = Block(keys[1])
        self.norm = eqx.nn.LayerNorm(DIM)
        self.logits = eqx.nn.Linear(DIM, VOCABULARY, use_bias=False, key=keys[2])

    def __call__(self, tokens):
        """One sequence [T]."""
        x = self.block(jax.vmap(self.embed)(jax.nn.one_hot(tokens, VOCABULARY)))
        return jax.vmap(self.logits)(jax.vmap(self.norm)(x))


def init(key):
    """The model and the optimiser's state."""
    model = Model(key)
    return model, optimizer.init(eqx.filter(model, eqx.is_array))


# [ringmoe]
@ringmoe.jit
# [/ringmoe]
@eqx.filter_jit
def step(state, tokens, targets):
    """One step of training: `(state, loss)`."""
    model, opt_state = state

    @eqx.filter_value_and_grad
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(tokens), targets).mean()

    loss, grads = loss_fn(model)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (eqx.apply_updates(model, updates), opt_state), loss


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
