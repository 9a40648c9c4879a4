"""RingMoE: ring attention and expert parallelism for any jitted JAX model."""
