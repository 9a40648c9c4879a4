"""Two processes of four CPU devices each: the ring, the expert exchange and places in queues cross from one to the other."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

import ringmoe

WORKER = """
import sys
port, index = sys.argv[1], int(sys.argv[2])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=120)
import functools
import itertools
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import ringmoe
from ringmoe.router.config import PRIORITIES, SCOPES
assert jax.device_count() == 8 and jax.local_device_count() == 4
rng = np.random.default_rng(0)
normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
q, k, v = normal(1, 16, 8, 4), normal(1, 16, 1, 4), normal(1, 16, 1, 4)
x, router, w_in, w_out = normal(1, 32, 4), normal(4, 8), normal(8, 4, 6), normal(8, 6, 4)
config = ringmoe.RouterConfig(8, top_k=2, capacity_factor=0.75, group_size=4)

def attention(exchange):
    def fun(q, k, v):
        out = ringmoe.dot_product_attention(q, k, v, is_causal=True, exchange=exchange)
        return jnp.sum(out ** 2), out
    fun.__name__ = exchange
    return fun

def experts(x, router, w_in, w_out):
    y, metrics = ringmoe.moe_ffn(x, router, w_in, w_out, config=config)
    return jnp.sum(y ** 2) + metrics.load_balance_loss, (y, metrics.dropped)

def close(name, got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        w = np.asarray(w)
        for shard in g.addressable_shards:
            np.testing.assert_allclose(shard.data, w[shard.index], rtol=tolerance, atol=tolerance, err_msg=name)

sequence = P(None, "a")
for fun, arrays, specs, collective in (
    (attention("ring"), (q, k, v), (sequence,) * 3, "collective-permute"),
    (attention("all_to_all"), (q, k, v), (sequence,) * 3, "all-to-all"),
    (attention("merge"), (q, k, v), (sequence,) * 3, "reduce"),
    (experts, (x, router, w_in, w_out), (sequence, P(), P("a"), P("a")), "all-to-all"),
):
    gradient = jax.value_and_grad(fun, tuple(range(len(arrays))), has_aux=True)
    with jax.default_device(jax.local_devices()[0]):
        want = jax.jit(gradient)(*map(jnp.asarray, arrays))
    for door, types, jit in (("types", AxisType.Explicit, jax.jit), ("ringmoe.jit", AxisType.Auto, ringmoe.jit)):
        mesh = jax.make_mesh((8,), ("a",), axis_types=(types,))
        place = lambda a, spec: jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda index: a[index])
        placed = [place(a, spec) for a, spec in zip(arrays, specs)]
        jitted = jit(gradient)
        compiled = jitted.lower(*placed).compile()
        assert collective in compiled.as_text(), (fun.__name__, door)
        (_, out), grads = compiled(*placed)
        close(f"{fun.__name__}, {door}: output", out, want[0][1], 1e-5)
        close(f"{fun.__name__}, {door}: gradient", grads, want[1], 1e-4)
        print("OK", fun.__name__, door, flush=True)

configs = [
    ringmoe.RouterConfig(8, 2, 0.75, group_size=16 if scope == "group" else None, scope=scope, priority=priority)
    for scope, priority in itertools.product(SCOPES, PRIORITIES)
]

@jax.jit
def choose(logits):
    routings = [ringmoe.route(logits, config, key=jax.random.key(0)) for config in configs]
    return [(routing.expert, routing.slot) for routing in routings]

logits = normal(2, 32, 8) + np.arange(8, dtype=np.float32) / 4
place = lambda types: jax.make_array_from_callback(
    logits.shape, NamedSharding(jax.make_mesh((2, 4), ("a", "b"), axis_types=(types,) * 2), P("a", "b")), lambda i: logits[i]
)
with jax.default_device(jax.local_devices()[0]):
    want = choose(jnp.asarray(logits))
placed = {types: choose(place(types)) for types in (AxisType.Explicit, AxisType.Auto)}
digests = set()
for n, config in enumerate(configs):
    for types, got in placed.items():
        for x, expected in zip(got[n], map(np.asarray, want[n])):
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=f"{config} {types}")
    slot = np.asarray(want[n][1])
    assert (slot < 0).any() and (slot >= 0).any()
    digests.add(slot.tobytes())
assert len(digests) > 3, "scopes and priorities keep different choices"
print("OK kept", flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.oldest
def test_two_processes_agree_with_one(tmp_path):
    from tests.conftest import FLAGS

    flags = " ".join(flag for flag in FLAGS if "device_count" not in flag) + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(pathlib.Path(ringmoe.__file__).parents[1])}
    port = free_port()
    logs = [tmp_path / f"process{i}.log" for i in range(2)]
    workers = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, "-c", WORKER, str(port), str(i)]
            workers.append(subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT))
        codes = []
        for worker in workers:
            try:
                codes.append(worker.wait(timeout=420))
            except subprocess.TimeoutExpired:
                codes.append("timed out")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    shown = "\n".join(f"--- process {i}: {code}\n{log.read_text()}" for i, (code, log) in enumerate(zip(codes, logs)))
    if codes != [0, 0]:
        pytest.fail(shown)
    for log in logs:
        for op in ("ring", "all_to_all", "merge", "experts"):
            for door in ("types", "ringmoe.jit"):
                assert f"OK {op} {door}" in log.read_text(), shown
        assert "OK kept" in log.read_text(), shown
