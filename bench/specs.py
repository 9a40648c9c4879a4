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
