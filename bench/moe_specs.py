"""Shapes of the expert layer's benchmarks, with the models they come from, cut down to what a CPU can time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MoeSpec:
    """One layer: T tokens in one sequence, D model dim, F hidden dim, E experts, k choices; SwiGLU, float32."""

    name: str
    num_tokens: int
    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    capacity_factor: float = 1.25
    group_size: int = 256


MOE_SPECS = (
    MoeSpec("mixtral/8", 2048, 512, 1792, 8, 2),  # Mixtral 8x7B (D 4096, F 14336, 8 experts, top 2) at an eighth of its dims
    MoeSpec("qwen3-30b/8", 512, 256, 96, 128, 8),  # Qwen3-30B-A3B (D 2048, F 768, 128 experts, top 8) at an eighth
)
