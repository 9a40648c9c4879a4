"""How tokens choose experts and how many tokens an expert takes: `RouterConfig`, and the published ones by name."""

import dataclasses
import fractions
import math
from typing import Any

from ringmoe.errors import check

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
METHODS = ("top_k", "expert_choice", "sinkhorn")
NOISES = (None, "learned", "gaussian", "jitter")
SCOPES = ("group", "sequence", "global")
PRIORITIES = ("choice", "position", "probability", "batch", "random")
ROUNDINGS = {"ceil": math.ceil, "floor": math.floor, "nearest": lambda x: math.floor(x + fractions.Fraction(1, 2))}
LARGE_GROUP = 4096  # drops little more than a whole sequence does, and one device holds that many tokens
RENORMALIZE = (True, False, "after_drops")


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts and how many tokens an expert takes.

    The scores s of a token are `score(logits)`, over all experts, or over the chosen ones with `select_first`. Experts are
    chosen by logits, or by scores plus the selection bias where `route` is given one or experts stand in groups. Weights:

        w_j = weight_scale * expert_scale[e_j] * s[e_j] / (sum over the token's choices of s if renormalize else 1)

    Args:
        num_experts: E >= 1.
        top_k: k, distinct experts per token, 1 <= k <= E. Default 2.
        capacity_factor: slots offered over slots asked if routing were even; > 0. Default 1.25. None: dropless; with
            expert choice, which needs a number, it is how many experts serve a token on average, over k.
        group_size: i, consecutive tokens along T that compete for slots: T must be a multiple of it. Groups may be cut by
            the mesh: what is dropped never depends on it. Default None: the largest divisor of T from 1024 to 4096; of a T
            without such a divisor, all of it.
        renormalize: True: weights are divided by their sum, before anything is dropped (default); False: never;
            "after_drops": by the sum of those that found a slot.
        scope: "group": tokens compete within `group_size` consecutive ones (default); "sequence": within a sequence;
            "global": all tokens of the call compete.
        priority: who comes first where slots run out. "choice": all first choices, then all second ones, in token order
            (GShard, default); "position": token order; "probability": the largest weights (Megatron); "batch": as
            "choice", the tokens with the largest score first (V-MoE, https://arxiv.org/abs/2106.05974); "random": as
            "choice", the tokens in a random order, by the key (DeepSpeed's random token selection).
        rounding: of the capacity: "ceil" (default), "floor", "nearest".
        min_capacity: an expert's slots are at least so many, in each group. Default 1.
        score: "softmax" (default), "sigmoid", "sqrt_softplus" (sqrt(log(1 + e^x)), DeepSeek-V4).
        select_first: softmax over the chosen logits alone (gpt-oss). Default False: over all.
        expert_groups, top_groups: experts stand in so many groups of consecutive ones, and a token chooses among those of
            its best `top_groups` groups. Default 1, 1. `group_top`: a group is as good as the sum of its so many best
            scores: 1 in DeepSeek-V2, 2 in V3, k / top_groups in Megatron. Default 2. `excluded`: what the other groups'
            scores are set to: -inf (default), or 0 as Hugging Face's DeepSeek-V3 has it, where a negative bias may let an
            excluded expert win.
        weight_scale: of all weights: 16 in DeepSeek-V2, 2.5 in V3. Default 1.
        scale_input: top_k 1 only: `moe_ffn` multiplies the expert's input by the weight, not its output (Llama 4).
        noise: on the logits, in training only. "learned": n * softplus(x W_noise), n normal (Shazeer,
            https://arxiv.org/abs/1701.06538); "gaussian": n * noise_scale; "jitter": the router's input times uniform
            [1 - noise_scale, 1 + noise_scale] (Switch). Default None.
        noise_scale: see `noise`; default 1 (of Gaussian noise) and 0.01 (of jitter) where None.
        method: "top_k" (default); "expert_choice": each expert takes its capacity of tokens with the largest scores, from 0
            to E experts a token (https://arxiv.org/abs/2202.09368; it looks at later tokens: not for causal models);
            "sinkhorn": in training, top-k of scores that `sinkhorn_iterations` of Sinkhorn's algorithm balanced over each
            sequence, or over all tokens with scope "global"; the weights are of scores that weren't balanced.
        sinkhorn_iterations: default 8.

    Raises:
        ValueError: a field out of the ranges above, or two that contradict each other.

    Which scope: a router that is balanced in the long run drops so much at capacity 1.25, T 8192, top-2 of 8 / top-8 of 64 /
    of 128 / of 256, where half of the logits' variance is shared by 64 neighbours, as it is in text (bench/drops.py): groups
    of 256 tokens 10 / 18 / 27 / 35%, of 1024 3 / 5 / 9 / 15%, of 4096 0.1 / 0.6 / 2 / 4%, a sequence 0 / 0.1 / 0.6 / 1.7%,
    8 sequences together nothing. With independent logits groups of 256 drop 0.1 / 0.6 / 2 / 5%, larger ones next to nothing.
    So the default is groups of about 4096. A group that the mesh cuts costs rows, since one device's tokens may fill all of an
    expert's slots: Mixtral's layer on v6e:2x4, 4096 tokens a device, forward, by the inspector: 5.5 ms with whole groups, 23
    with one sequence over all devices. So groups had better divide what one device holds of a sequence.
    """

    num_experts: int
    top_k: int = 2
    capacity_factor: float | None = 1.25
    group_size: int | None = None
    renormalize: bool | str = True
    scope: str = "group"
    priority: str = "choice"
    rounding: str = "ceil"
    min_capacity: int = 1
    score: str = "softmax"
    select_first: bool = False
    expert_groups: int = 1
    top_groups: int = 1
    group_top: int = 2
    excluded: float = -math.inf
    weight_scale: float = 1.0
    scale_input: bool = False
    noise: str | None = None
    noise_scale: float | None = None
    method: str = "top_k"
    sinkhorn_iterations: int = 8

    def __post_init__(self):
        for name, allowed in (
            ("score", SCORES), ("method", METHODS), ("noise", NOISES), ("scope", SCOPES), ("priority", PRIORITIES),
            ("rounding", tuple(ROUNDINGS)), ("renormalize", RENORMALIZE),
        ):  # fmt: skip
            value = getattr(self, name)
            check(value in allowed, f"{name}={value!r}, expected one of {allowed}")
        self._check_choices()
        self._check_capacity()
        check(
            self.noise_scale is None or (self.noise in ("gaussian", "jitter") and self.noise_scale >= 0),
            f"noise_scale={self.noise_scale} with noise={self.noise!r}, expected a number >= 0 with 'gaussian' or 'jitter', "
            "else None",
        )
        check(self.sinkhorn_iterations >= 1, f"sinkhorn_iterations={self.sinkhorn_iterations}, expected at least 1")

    def _check_choices(self):
        check(
            self.num_experts >= 1, f"num_experts={self.num_experts}, expected at least 1: give the number of experts E"
        )
        check(
            1 <= self.top_k <= self.num_experts,
            f"top_k={self.top_k} with num_experts={self.num_experts}, expected 1 <= top_k <= num_experts: "
            "a token's choices are distinct experts, so lower top_k or add experts",
        )
        check(
            self.expert_groups >= 1 and self.num_experts % self.expert_groups == 0,
            f"expert_groups={self.expert_groups} with num_experts={self.num_experts}, expected a divisor of num_experts",
        )
        in_group = self.num_experts // self.expert_groups
        check(
            1 <= self.top_groups <= self.expert_groups and self.top_groups * in_group >= self.top_k,
            f"top_groups={self.top_groups} of {self.expert_groups} groups of {in_group} experts with top_k={self.top_k}, "
            "expected at most expert_groups, and top_k experts among those groups",
        )
        check(
            self.expert_groups == 1 or 1 <= self.group_top <= in_group,
            f"group_top={self.group_top} with groups of {in_group} experts, expected 1 <= group_top <= {in_group}",
        )
        check(
            not self.select_first or self.score == "softmax",
            f"select_first=True with score={self.score!r}: only softmax differs, expected score='softmax'",
        )
        check(
            not self.scale_input or self.top_k == 1,
            f"scale_input=True with top_k={self.top_k}: an input has one weight, expected top_k=1",
        )
        check(
            self.method != "expert_choice" or not (self.select_first or self.expert_groups > 1 or self.scale_input),
            "method='expert_choice' with select_first, expert_groups or scale_input: an expert chooses among all tokens, "
            "by scores over all experts",
        )

    def _check_capacity(self):
        factor = self.capacity_factor
        check(
            factor is None or (math.isfinite(factor) and factor > 0),
            f"capacity_factor={factor}, expected a finite number > 0 or None: pass None if no token may be dropped",
        )
        check(
            factor is not None or self.method != "expert_choice",
            "capacity_factor=None with method='expert_choice', expected a number: it says how many tokens an expert takes",
        )
        check(
            self.group_size is None or self.group_size >= 1,
            f"group_size={self.group_size}, expected at least 1 or None: None takes the largest divisor of T from 1024 to 4096",
        )
        check(
            self.group_size is None or self.scope == "group",
            f"group_size={self.group_size} with scope={self.scope!r}: give a group size with scope='group' only",
        )
        check(self.min_capacity >= 1, f"min_capacity={self.min_capacity}, expected at least 1")

    @property
    def noise_on_logits(self) -> bool:
        """Whether training adds noise to the logits; jitter is on what they are made of."""
        return self.noise in ("learned", "gaussian")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "RouterConfig":
        """A published router by name, with some fields changed: `RouterConfig.preset("mixtral", capacity_factor=1.25)`.

        Names: top2_noisy, gshard, switch, st_moe, mixtral, qwen3, olmoe, deepseek_v2, deepseek_v3, gpt_oss, llama4. Numbers
        of experts are the published ones; models that were described as dropless have `capacity_factor=None`.
        ValueError for another name.
        """
        check(name in PRESETS, f"no preset {name!r}, expected one of {tuple(PRESETS)}")
        return cls(**PRESETS[name] | changes)

    def group(self, *tokens: int) -> int:
        """How many tokens compete, for tokens [*batch, T]: a divisor of T, or all of them.

        Raises ValueError if T is not a multiple of `group_size`.
        """
        if self.scope == "global":
            return math.prod(tokens)
        if self.scope == "sequence":
            return tokens[-1]
        if self.group_size is None:
            return next((i for i in range(LARGE_GROUP, LARGE_GROUP // 4 - 1, -1) if tokens[-1] % i == 0), tokens[-1])
        check(
            tokens[-1] % self.group_size == 0,
            f"{tokens[-1]} tokens along the sequence with group_size={self.group_size}, expected a multiple of it: "
            "pad the sequence (and mask the padding with token_mask) or choose another group_size",
        )
        return self.group_size

    def capacity(self, group_size: int) -> int:
        """C = min(i, max(min_capacity, round(i * k * capacity_factor / E))) slots per group and expert; i if dropless.

        The product is taken exactly (1.1 means eleven tenths) and rounded once, at the end. Others differ: MaxText rounds
        i * k / E up before the factor; Tutel and DeepSpeed round T / E; flaxformer leaves k out; Megatron, MegaBlocks and
        DeepSpeed count the tokens of a rank, so that their drops change with the number of devices. Ours never do.
        """
        if self.capacity_factor is None:
            return group_size
        factor = fractions.Fraction(self.capacity_factor).limit_denominator(10**6)
        slots = ROUNDINGS[self.rounding](group_size * self.top_k * factor / self.num_experts)
        return min(group_size, max(self.min_capacity, slots))


PRESETS: dict[str, dict[str, Any]] = {
    # Top-2 with learned noise, a capacity and the balance loss, as sparse multimodal models of GShard's line are described.
    "top2_noisy": dict(num_experts=8, noise="learned"),
    "gshard": dict(num_experts=128, capacity_factor=1.0),
    "switch": dict(num_experts=128, top_k=1, renormalize=False, noise="jitter", noise_scale=0.01),
    "st_moe": dict(num_experts=32, noise="jitter", noise_scale=0.01),
    "mixtral": dict(num_experts=8, capacity_factor=None),
    "qwen3": dict(num_experts=128, top_k=8, capacity_factor=None),
    "olmoe": dict(num_experts=64, top_k=8, capacity_factor=None, renormalize=False),
    "deepseek_v2": dict(num_experts=160, top_k=6, capacity_factor=None, renormalize=False, expert_groups=8, top_groups=3,
                        group_top=1, weight_scale=16.0),
    "deepseek_v3": dict(num_experts=256, top_k=8, capacity_factor=None, score="sigmoid", expert_groups=8, top_groups=4,
                        group_top=2, weight_scale=2.5),
    "gpt_oss": dict(num_experts=128, top_k=4, capacity_factor=None, select_first=True, renormalize=False),
    "llama4": dict(num_experts=16, top_k=1, capacity_factor=None, score="sigmoid", renormalize=False, scale_input=True),
}  # fmt: skip
"""Fields of the published routers: GShard 2006.16668, Switch 2101.03961, ST-MoE 2202.08906, Mixtral 2401.04088, Qwen3
2505.09388, OLMoE 2409.02060, DeepSeek-V2 2405.04434, -V3 2412.19437, and the released code of gpt-oss and Llama 4."""
