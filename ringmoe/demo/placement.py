"""Where the demo's arrays live: the only file of the demo that knows the mesh.

The mesh has two axes. `seq` shards the bytes of a sequence: attention becomes a ring over it. `expert` shards the batch
and the experts: a byte whose expert lives elsewhere travels along it and back. All other weights are replicated.
"""

import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("expert", "seq")
MESH_SHAPE = (2, 4)
NUM_DEVICES = MESH_SHAPE[0] * MESH_SHAPE[1]

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # libtpu only compiles here: it shall neither look for a TPU, nor complain that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
_XLA_FLAGS = {
    "xla_force_host_platform_device_count": NUM_DEVICES,
    # Eight devices take turns on a few cores: a device that waits long for its neighbours is no deadlock.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 300,
    "xla_cpu_collective_call_terminate_timeout_seconds": 1200,
    "xla_cpu_collective_timeout_seconds": 1200,
}


def use_cpu_devices() -> None:
    """Makes JAX see `NUM_DEVICES` CPU devices; call it before anything else touches a device.

    Raises:
      RuntimeError: JAX was initialised before, with fewer devices.
    """
    os.environ.update(_ENVIRONMENT)
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [f"--{name}={value}" for name, value in _XLA_FLAGS.items() if not re.search(rf"--{name}\b", given)]
    os.environ["XLA_FLAGS"] = " ".join([given, *wanted]).strip()
    jax.config.update("jax_platforms", "cpu")  # JAX may have been imported, and have read JAX_PLATFORMS, already
    found = jax.devices()
    if found[0].platform != "cpu" or len(found) < NUM_DEVICES:
        raise RuntimeError(
            f"JAX has {len(found)} {found[0].platform} devices, the demo needs {NUM_DEVICES} CPU devices; run it in a "
            f"process of its own, without another device count in XLA_FLAGS ({given!r}) and before JAX is initialised"
        )


def make_mesh(devices: Any) -> Mesh:
    """The demo's mesh over the first `NUM_DEVICES` of `devices`; its axes are Auto: what lies between is inferred."""
    grid = np.array(devices[:NUM_DEVICES]).reshape(MESH_SHAPE)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Sharding of each leaf of the parameters, or of an optimiser's state shaped like them: only experts are cut."""

    def of(path, leaf):
        is_expert = any(getattr(entry, "key", None) == "experts" for entry in path)
        return NamedSharding(mesh, P("expert") if is_expert else P())

    return jax.tree_util.tree_map_with_path(of, state)


def tokens_per_device(batch_size: int, length: int) -> tuple[int, int]:
    """What one device of the demo's mesh holds of tokens [B, T]."""
    return batch_size // MESH_SHAPE[0], length // MESH_SHAPE[1]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of tokens [B, T]."""
    return NamedSharding(mesh, P("expert", "seq"))


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of `tree` without its values: what compiling needs."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
