"""The shapes that are measured, each with the model it comes from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Causal self-attention in float32; letters as in `jax.nn.dot_product_attention`, T == S."""

    name: str
    b: int
    t: int
    n: int
    k: int
    h: int
    rounds: int  # how often each side is timed

    def flops(self, backward: bool) -> float:
        """Matrix-multiply work of the unmasked half: two products forward, five more backward."""
        return (7 if backward else 2) * self.b * self.n * self.t**2 * self.h


ATTENTION = (
    # T5-small (d_model 512, 8 heads of 64) at GPT-3's context length and at four times that
    AttentionShape("t5_small_2k", b=1, t=2048, n=8, k=8, h=64, rounds=9),
    AttentionShape("t5_small_8k", b=1, t=8192, n=8, k=8, h=64, rounds=3),
)


@dataclasses.dataclass(frozen=True)
class ExpertsShape:
    """One layer: T tokens in one sequence, D model dim, F hidden dim, E experts, k choices; SwiGLU, float32."""

    name: str
    num_tokens: int
    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    capacity_factor: float | None = 1.25
    group_size: int | None = 256


EXPERTS = (
    ExpertsShape(
        "mixtral/8", 2048, 512, 1792, 8, 2
    ),  # Mixtral 8x7B (D 4096, F 14336, 8 experts, top 2) at an eighth of its dims
    ExpertsShape("qwen3-30b/8", 512, 256, 96, 128, 8),  # Qwen3-30B-A3B (D 2048, F 768, 128 experts, top 8) at an eighth
)

LAYERS = (
    ExpertsShape("wide", 8192, 512, 1792, 8, 2),  # Mixtral's at an eighth, as above
    ExpertsShape("fine", 8192, 512, 192, 64, 4),
    ExpertsShape("finest", 8192, 512, 96, 128, 8),
)
