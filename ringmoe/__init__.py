"""RingMoE: ring attention and expert parallelism for any jitted JAX model."""

from ringmoe.attention import dot_product_attention as dot_product_attention
from ringmoe.lowering import jit as jit
