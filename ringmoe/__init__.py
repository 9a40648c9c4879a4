"""RingMoE: ring attention and expert parallelism for any jitted JAX model."""

from ringmoe.attention import dot_product_attention as dot_product_attention
from ringmoe.lowering import jit as jit
from ringmoe.moe import combine as combine
from ringmoe.moe import dispatch as dispatch
from ringmoe.moe import moe_ffn as moe_ffn
from ringmoe.router import MoeMetrics as MoeMetrics
from ringmoe.router import RouterConfig as RouterConfig
from ringmoe.router import Routing as Routing
from ringmoe.router import route as route
