"""Kernels, and the one place that knows which platform runs which."""

from collections.abc import Callable, Iterator
from types import ModuleType

from ringmoe.errors import Unsuited, check, warn_once
from ringmoe.pallas import attention_gpu, attention_tpu, attention_xla, decode_gpu, decode_tpu, experts_xla
from ringmoe.pallas.hopper import is_hopper

KERNELS: dict[str, dict[str, ModuleType]] = {
    "attention": {"tpu": attention_tpu, "gpu": attention_gpu, "xla": attention_xla},
    "experts": {"xla": experts_xla},
}
# Queries against many keys: tried before the kernel of the name.
FOR_FEW = {"attention": {"tpu": decode_tpu, "gpu": decode_gpu}}
PREFERRED = {"tpu": ("tpu", "xla"), "hopper": ("gpu", "xla")}  # any other platform: the XLA kernel
ONLY_ON = {"gpu": "hopper"}  # what no interpreter runs elsewhere


def platform_of(platform: str, device_kind: str) -> str:
    """JAX's platform, more closely where kernels are a chip's: "hopper" for a GPU that is one."""
    return "hopper" if platform == "cuda" and is_hopper(device_kind) else platform


def check_implementation(op: str, implementation: str | None) -> None:
    """Raises ValueError for a name that `op` has no kernel of."""
    check(
        implementation is None or implementation in KERNELS[op],
        f"{implementation=}, expected None (the best for the platform) or one of {tuple(KERNELS[op])}",
    )


def pick(
    op: str, platform: str, implementation: str | None, accepts: Callable[[ModuleType], None], few: bool = False
) -> ModuleType:
    """The first kernel of `op` for `platform` that accepts the call.

    `accepts(kernel)` raises NotImplementedError with what the kernel lacks; then the next one is tried. An
    implementation that was asked for is the only one tried. Falling back is slower and said once, but where a kernel is
    Unsuited. `few`: whether few queries meet many keys.
    """
    refusals: list[tuple[str, NotImplementedError]] = []
    for name, kernel in _candidates(op, platform, implementation, few):
        try:
            if ONLY_ON.get(name, platform) != platform:
                raise NotImplementedError(f"the {name} kernel runs on a {ONLY_ON[name]} only")
            accepts(kernel)
        except NotImplementedError as refusal:
            refusals.append((name, refusal))
            continue
        for refused, refusal in refusals:
            if isinstance(refusal, Unsuited) or refused == name:  # which was asked for
                continue
            warn_once(f"{op} on {platform}", f"the {name} kernel runs instead of a faster one: {refusal}")
        return kernel
    raise ExceptionGroup(f"no kernel of {op} takes this call on {platform}", [refusal for _, refusal in refusals])


def _candidates(op: str, platform: str, implementation: str | None, few: bool) -> Iterator[tuple[str, ModuleType]]:
    """Names and kernels, in the order in which they are tried."""
    for name in (implementation,) if implementation else PREFERRED.get(platform, ("xla",)):
        kernel = FOR_FEW.get(op, {}).get(name) if few else None
        if kernel is not None:
            yield name, kernel
        # For few queries a kernel for many takes as long as for a whole block of them, longer than XLA's: only if asked for.
        if name in KERNELS[op] and (kernel is None or implementation):
            yield name, KERNELS[op][name]
