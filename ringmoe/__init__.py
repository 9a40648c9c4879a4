"""RingMoE: ring attention and expert parallelism for any jitted JAX model."""

import pathlib

from jax.extend import source_info_util

from ringmoe import masks as masks
from ringmoe.attention import dot_product_attention as dot_product_attention
from ringmoe.circles import ring_mesh as ring_mesh
from ringmoe.decode import decode_attention as decode_attention
from ringmoe.decode import update_cache as update_cache
from ringmoe.dense import SharedExpert as SharedExpert
from ringmoe.inspector import OverlapReport as OverlapReport
from ringmoe.inspector import inspect as inspect
from ringmoe.inspector.machines import Target as Target
from ringmoe.inspector.machines import target as target
from ringmoe.inspector.machines import targets as targets
from ringmoe.interface import RESIDUAL_NAMES as RESIDUAL_NAMES
from ringmoe.lowering import explain as explain
from ringmoe.lowering import jit as jit
from ringmoe.moe import combine as combine
from ringmoe.moe import dispatch as dispatch
from ringmoe.moe import moe_ffn as moe_ffn
from ringmoe.router import MoeMetrics as MoeMetrics
from ringmoe.router import RouterConfig as RouterConfig
from ringmoe.router import Routing as Routing
from ringmoe.router import drops_by_part as drops_by_part
from ringmoe.router import hash_experts as hash_experts
from ringmoe.router import route as route
from ringmoe.router import update_selection_bias as update_selection_bias

# Tracebacks and `explain` point at the caller's line, not at ours; the demo's model is a caller.
for _part in ("attention.py", "compat.py", "decode.py", "dense.py", "ffn.py", "moe.py", "lowering", "pallas", "primitives",
              "router", "schedule"):  # fmt: skip
    source_info_util.register_exclusion(str(pathlib.Path(__file__).parent / _part))
