"""Training steps whose times were published, as programs to compile: predicted against measured.

    python -m bench.published [NAME ...]

One decoder, written the usual way, with the settings of each public run: widths, batch, remat, optimizer, sharding, compiler
flags. The published figure is a step's seconds or the rate of model FLOPs that it was computed from; `Run.seconds` undoes
that. One rule predicts all rows; none of its constants was set by any of them.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.pallas.ops.tpu import flash_attention, splash_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe

FUSE = "xla_tpu_enable_async_collective_fusion"
GATHERS = {FUSE: True, f"{FUSE}_fuse_all_gather": True, f"{FUSE}_multiple_steps": True,
           "xla_tpu_overlap_compute_collective_tc": True, "xla_enable_async_all_gather": True}  # fmt: skip
REDUCES = {"xla_tpu_enable_data_parallel_all_reduce_opt": True, "xla_tpu_data_parallel_opt_different_sized_ops": True}
V5P = {"xla_tpu_overlap_compute_collective_tc": True, "xla_enable_async_all_gather": True,
       "xla_tpu_megacore_fusion_allow_ags": False, "xla_enable_async_collective_permute": True,
       "xla_tpu_enable_ag_backward_pipelining": True}  # fmt: skip
V6E = {"xla_tpu_scoped_vmem_limit_kib": 98304, "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1000000}


@dataclasses.dataclass(frozen=True)
class Run:
    """A public run. `batch` is sequences a device; `rate` is published model TFLOP/s a device, `step` seconds."""

    name: str
    target: str
    embed: int
    layers: int
    heads: int
    key_heads: int
    head: int
    mlp: int
    vocab: int
    batch: int
    tokens: int
    source: str
    tensor: int = 1
    gated: bool = True
    parallel: bool = False  # attention and MLP of the same norm, side by side
    tied: bool = False
    remat: str = "full"
    kernel: str = "splash"
    block: int = 2048
    fused: bool = True
    weights: str = "float32"
    rate: float = 0.0
    step: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def parameters(self) -> int:
        attention = self.embed * self.head * 2 * (self.heads + self.key_heads)
        layer = attention + (3 if self.gated else 2) * self.embed * self.mlp
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.embed

    @property
    def model_flops(self) -> float:
        """FLOPs of a step and device as the source counts them: 6 for each parameter and token, and causal attention."""
        causal = 6 * self.layers * self.heads * self.head * self.tokens**2 * self.batch
        return 6.0 * self.parameters * self.tokens * self.batch + causal

    @property
    def seconds(self) -> float:
        return self.step or self.model_flops / self.rate / 1e12


_CONFIGS = "MaxText, MaxText/configs of December 2023, "
_old = functools.partial(
    Run, gated=False, parallel=True, tied=True, vocab=32768, tokens=2048, kernel="flash", block=512
)
_RECIPES = "AI-Hypercomputer/tpu-recipes, training/trillium/"
_offloaded = functools.partial(Run, vocab=128256, tokens=8192, remat="offload", options=tuple(V6E.items()))

RUNS = (
    _old("16B v5e-256", "v5e:16x16", 5120, 32, 32, 32, 256, 32768, batch=6, rate=120, source=_CONFIGS + "v5e/16b.sh",
         options=tuple((GATHERS | REDUCES).items())),
    _old("32B v5e-256", "v5e:16x16", 10240, 32, 32, 32, 256, 32768, batch=4, rate=132, source=_CONFIGS + "v5e/32b.sh",
         options=tuple((GATHERS | REDUCES).items())),
    _old("32B v5p-128", "v5p:4x4x4", 10240, 32, 32, 32, 256, 32768, batch=8, rate=328, source=_CONFIGS + "v5p/32b.sh",
         tensor=4, remat="minimal", options=tuple((REDUCES | V5P).items())),
    _offloaded("Llama 3.1 8B v6e-8", "v6e:2x4", 4096, 32, 32, 8, 128, 14336, batch=3, step=3.443,
               source=_RECIPES + "Llama3.1-8B-MaxText/v6e-8"),
    _offloaded("Llama 3.1 8B v6e-256", "v6e:16x16", 4096, 32, 32, 8, 128, 14336, batch=4, step=4.546,
               source=_RECIPES + "Llama3.1-8B-MaxText/v6e-256"),
    _offloaded("Llama 3.1 70B v6e-32", "v6e:4x8", 8192, 80, 64, 8, 128, 28672, batch=2, step=17.790, weights="bfloat16",
               source=_RECIPES + "Llama3.1-70B-MaxText/v6e-32"),
    _offloaded("Mistral 7B v6e-8", "v6e:2x4", 4096, 32, 32, 8, 128, 14336, vocab=32000, batch=6, step=6.320,
               source=_RECIPES + "Mistral-7B-MaxText"),
    _offloaded("Llama 2 70B v6e-256", "v6e:16x16", 8192, 80, 64, 8, 128, 28672, vocab=32000, batch=2, tokens=4096,
               step=9.052, source=_RECIPES + "Llama2-70B-MaxText", block=1024),
)  # fmt: skip


def weights(run: Run, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings: the embedding dim over `fsdp`, heads, hidden units and vocabulary over `tensor`."""
    d, h, n, k = run.embed, run.head, run.heads, run.key_heads
    layer = {
        "norm1": ((d,), P("fsdp")), "q": ((d, n, h), P("fsdp", "tensor")), "k": ((d, k, h), P("fsdp", "tensor")),
        "v": ((d, k, h), P("fsdp", "tensor")), "o": ((n, h, d), P("tensor", None, "fsdp")),
        "up": ((d, run.mlp), P("fsdp", "tensor")), "down": ((run.mlp, d), P("tensor", "fsdp")),
    }  # fmt: skip
    if run.gated:
        layer["gate"] = layer["up"]
    if not run.parallel:
        layer["norm2"] = layer["norm1"]
    shapes = {name: ((run.layers, *shape), P(None, *spec)) for name, (shape, spec) in layer.items()}
    shapes |= {"norm": ((d,), P("fsdp")), "embed": ((run.vocab, d), P("tensor", "fsdp"))}
    if not run.tied:
        shapes["unembed"] = ((d, run.vocab), P("fsdp", "tensor"))
    return {
        name: jax.ShapeDtypeStruct(shape, run.weights, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }


def attention(run: Run, mesh: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention on [B, T, N, H] by the kernel that the public run used."""
    spec = P("fsdp", "tensor")

    def flash(q, k, v):
        block = min(run.block, q.shape[2])
        sizes = flash_attention.BlockSizes(
            block_q=block, block_k_major=block, block_k=block, block_b=1, block_q_major_dkv=block, block_k_major_dkv=block,
            block_q_dkv=block, block_k_dkv=block, block_q_dq=min(1024, block * 2), block_k_dq=256, block_k_major_dq=block,
        )  # fmt: skip
        return flash_attention.flash_attention(q, k, v, causal=True, sm_scale=1.0, block_sizes=sizes)

    def splash(q, k, v):
        block, heads = min(run.block, q.shape[2]), q.shape[1]
        sizes = splash_attention.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=None, block_kv_dq=None, use_fused_bwd_kernel=True,
        )  # fmt: skip
        mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((run.tokens, run.tokens))] * heads)
        kernel = splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        return jax.vmap(kernel)(q, jnp.repeat(k, heads // k.shape[1], 1), jnp.repeat(v, heads // v.shape[1], 1))

    heads_first = (x.transpose(0, 2, 1, 3) for x in (q * run.head**-0.5, k, v))
    body = jax.shard_map(flash if run.kernel == "flash" else splash, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,
                         check_vma=False)  # fmt: skip
    return body(*heads_first).transpose(0, 2, 1, 3)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale.astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of [B, T, N, H]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 1e4 ** (jnp.arange(half) / half)
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def step(run: Run, mesh: Any, optimizer: Any):
    """One training step: (weights, optimizer state, tokens, targets) -> (weights, state, loss)."""

    def placed(x, *spec):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def layer(x, w):
        w = {name: value.astype(jnp.bfloat16) for name, value in w.items()}
        x = jax.ad_checkpoint.checkpoint_name(placed(x, "fsdp", None, "tensor"), "decoder_layer_input")
        y = norm(x, w["norm1"])
        q, k, v = (
            jax.ad_checkpoint.checkpoint_name(placed(jnp.einsum("btd,dnh->btnh", y, w[i]), "fsdp", None, "tensor"), i)
            for i in ("q", "k", "v")
        )
        a = attention(run, mesh, rotate(q), rotate(k), v)
        a = jax.ad_checkpoint.checkpoint_name(
            placed(jnp.einsum("btnh,nhd->btd", a, w["o"]), "fsdp", None, "tensor"), "o"
        )
        if not run.parallel:
            x = x + a
            y = norm(x, w["norm2"])
        up = jnp.einsum("btd,df->btf", y, w["up"])
        up = jax.nn.silu(jnp.einsum("btd,df->btf", y, w["gate"])) * up if run.gated else jax.nn.relu(up)
        m = jnp.einsum("btf,fd->btd", placed(up, "fsdp", None, "tensor"), w["down"])
        return placed(x + m + a if run.parallel else x + m, "fsdp", None, "tensor"), None

    def loss(w, tokens, targets):
        outer = {name: w[name] for name in ("embed", "norm", "unembed") if name in w}
        x = placed(jnp.take(outer["embed"].astype(jnp.bfloat16), tokens, axis=0), "fsdp", None, "tensor")
        x, _ = lax.scan(jax.checkpoint(layer, policy=policy(run), prevent_cse=False), x,
                        {name: value for name, value in w.items() if name not in outer})  # fmt: skip
        x = norm(x, outer["norm"])
        head = outer["embed"].T if run.tied else outer["unembed"]
        logits = placed(x @ head.astype(jnp.bfloat16), "fsdp", None, "tensor").astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    def update(w, state, tokens, targets):
        value, gradient = jax.value_and_grad(loss)(w, tokens, targets)
        change, state = optimizer.update(gradient, state, w)
        return optax.apply_updates(w, change), state, value

    return update


def policy(run: Run) -> Any:
    """What the public run's remat policy keeps."""
    if run.remat == "minimal":
        return jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    if run.remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["decoder_layer_input", "q", "k", "v", "o"],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return None


def program(run: Run):
    """(function, arguments, mesh) for `ringmoe.inspect`."""
    machine = ringmoe.target(run.target)
    mesh = machine.mesh(
        {"fsdp": machine.num_devices // run.tensor, "tensor": run.tensor}, axis_types=(AxisType.Auto,) * 2
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-5, b1=0.9, b2=0.95, weight_decay=0.1))
    w = weights(run, mesh)
    state = jax.eval_shape(optimizer.init, w)
    like = {(x.shape): x.sharding for x in w.values()}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.get(x.shape, NamedSharding(mesh, P()))), state
    )
    ids = jax.ShapeDtypeStruct(
        (run.batch * machine.num_devices, run.tokens), "int32", sharding=NamedSharding(mesh, P("fsdp"))
    )
    function = jax.jit(step(run, mesh, optimizer), donate_argnums=(0, 1), compiler_options=dict(run.options))
    return function, (w, state, ids, ids), mesh


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="rows whose name contains one of these; all without")
    parser.add_argument("--keep", help="folder for the reports")
    args = parser.parse_args()
    for run in RUNS:
        if args.names and not any(name in run.name for name in args.names):
            continue
        started = time.perf_counter()
        function, arguments, mesh = program(run)
        report = ringmoe.inspect(function, *arguments, target=run.target, mesh=mesh)
        if args.keep:
            pathlib.Path(args.keep, f"{run.name.replace(' ', '-')}.json").write_text(report.to_json())
        print(f"{run.name}: predicted {report.us / 1e6:.2f} s, published {run.seconds:.2f} s, ratio "
              f"{report.us / 1e6 / run.seconds:.3f}; waiting {report.exposed_us / 1e6:.2f} s, {report.peak_bytes / 2**30:.1f} "
              f"GiB; {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
