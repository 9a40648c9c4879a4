"""Flax NNX: a byte model with experts, its sequence sharded over a mesh.

Lines between `# [ringmoe]` and `# [/ringmoe]` are RingMoE's; `# was:` tells the line of the ordinary program.
The step is Flax's functional form: `nnx.merge` and `nnx.split` inside `jax.jit`. With Explicit axes (`jax.make_mesh`'s
default, and `jax.set_mesh`) `jax.jit` stays, and so does an `nnx.jit` whose step changes the model in place.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/flax_nnx.py
"""

import jax
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# [ringmoe]
# was: from dense import experts
import ringmoe

# [/ringmoe]

VOCABULARY, DIM, HEADS, HIDDEN, EXPERTS = 256, 256, 2, 256, 8
optimizer = optax.sgd(0.1, momentum=0.9)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(DIM, rngs=rngs), nnx.LayerNorm(DIM, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            DIM,
            use_bias=False,
            decode=False,
            # [ringmoe]
            attention_fn=lambda q, k, v, is_causal, **_: ringmoe.dot_product_attention(q, k, v, is_causal=is_causal),
            # [/ringmoe]
            rngs=rngs,
        )
        normal = lambda *shape: nnx.Param(0.06 * rngs.params.normal(shape))
        self.router = normal(DIM, EXPERTS)
        self.experts_in, self.experts_out = normal(EXPERTS, DIM, HIDDEN), normal(EXPERTS, HIDDEN, DIM)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), is_causal=True)
        y = self.norm2(x)
        weights = self.router[...], self.experts_in[...], self.experts_out[...]
        # [ringmoe]
        # was: y = experts(y, *weights)
        y, _ = ringmoe.moe_ffn(y, *weights, config=ringmoe.RouterConfig(EXPERTS, capacity_factor=None, group_size=32))
        # [/ringmoe]
        return x + y


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(VOCABULARY, DIM, use_bias=False, rngs=rngs)
        self.block = Block(rngs)
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.logits = nnx.Linear(DIM, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.block(self.embed(jax.nn.one_hot(tokens, VOCABULARY)))
        return self.logits(self.norm(x))


def init(key):
    """Graph definition and state of the model and its optimiser."""
    model = Model(nnx.Rngs(key))
    return nnx.split((model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)))


# [ringmoe]
# was: @jax.jit
@ringmoe.jit
# [/ringmoe]
def step(state, tokens, targets):
    """One step of training: `(state, loss)`."""
    model, opt = nnx.merge(*state)

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    opt.update(model, grads)
    return nnx.split((model, opt)), loss


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
