"""FLOPs of dots, convolutions and kernels, read from one instruction."""

import math
import re

from ringmoe.inspector.reader import Instruction, Shape


def cost_estimate(instruction: Instruction) -> dict[str, float] | None:
    """The cost estimate a kernel's author gave (flops, transcendentals, bytes_accessed,
    remote_bytes_transferred), in Mosaic GPU, which has no place for it, as metadata."""
    call = instruction.config.get("custom_call_config")
    told = instruction.kernel_metadata
    cost = call.get("cost_estimate") if isinstance(call, dict) else told if "flops" in told else None
    if not isinstance(cost, dict):
        return None
    return {key: float(value) for key, value in cost.items() if re.fullmatch(r"-?\d+(\.\d+)?", str(value))}


def dot_flops(instruction: Instruction, shapes: list[Shape]) -> float:
    """2 x output elements x the product of the contracted dimensions."""
    contracting = re.findall(r"\d+", instruction.attributes.get("lhs_contracting_dims", ""))
    lhs = shapes[0].dims if shapes else ()
    return 2.0 * instruction.shape.elements * math.prod(lhs[int(d)] for d in contracting if int(d) < len(lhs))


def convolution_flops(instruction: Instruction, shapes: list[Shape]) -> float:
    """2 x batch x output features x input features x pairs of output and window positions that meet
    real input.

    The pairs matter on TPU, where a batched dot is a convolution over a dilated batch dimension,
    nearly all padding.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", ""))
    if (
        labels is None
        or len(shapes) < 2
        or any(
            len(names) != len(shape.dims)
            for names, shape in zip(labels.groups(), (shapes[0], shapes[1], instruction.shape), strict=True)
        )
    ):
        return 2.0 * instruction.shape.elements
    lhs, rhs, out = (
        dict(zip(names, shape.dims, strict=True))
        for names, shape in zip(labels.groups(), (shapes[0], shapes[1], instruction.shape), strict=True)
    )
    total = 2.0 * out.get("b", 1) * out.get("f", 1) * rhs.get("i", 1)
    spatial = sorted(name for name in out if name.isdigit())
    window = {key: window_field(instruction, key) for key in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")}
    for index, name in enumerate(spatial):
        pick = {key: max(values[index], 1) if index < len(values) else 1 for key, values in window.items()}
        low = window["pad"][index] if index < len(window["pad"]) else 0
        total *= _valid_pairs(
            lhs.get(name, 1),
            rhs.get(name, 1),
            out[name],
            pick["stride"],
            low,
            pick["lhs_dilate"],
            pick["rhs_dilate"],
        )
    return total


def _valid_pairs(size: int, window: int, outputs: int, stride: int, low: int, dilate: int, window_dilate: int) -> int:
    """How many (output, window) positions of one dimension fall on an input element rather than
    padding or a gap."""
    if window > 2**20:  # no program's: its taps are not counted one by one
        return window * outputs
    count = 0
    common = math.gcd(stride, dilate)
    for tap in range(window):
        # Input index i with i * dilate = output * stride + tap * window_dilate - low, 0 <= i <
        # size.
        offset = tap * window_dilate - low
        if offset % common:
            continue
        period = dilate // common
        first = (-offset // common * pow(stride // common, -1, period)) % period if period > 1 else 0
        lowest, highest = -(offset // stride), (((size - 1) * dilate - offset) // stride)
        lowest = max(lowest, 0)
        lowest += (first - lowest) % period
        highest = min(highest, outputs - 1)
        count += max(0, (highest - lowest) // period + 1)
    return count


def window_field(instruction: Instruction, key: str) -> list[int]:
    """One list of `window={size=3x3 pad=1_1x0_2 stride=2x1}`; for pad, the low ends."""
    found = re.search(rf"\b{key}=([\dx_\-]+)", instruction.attributes.get("window", ""))
    return [int(part.split("_")[0] or 0) for part in found.group(1).split("x")] if found else []


def rate_key(instruction: Instruction, shapes: list[Shape]) -> str:
    """Which matmul rate applies: the wider operand's dtype, and for f32 the precision asked for."""
    dtype = max(shapes[:2], key=lambda shape: shape.bytes / max(shape.elements, 1), default=Shape("bf16")).dtype
    precision = instruction.attributes.get("operand_precision", "")
    return "f32_highest" if dtype == "f32" and "highest" in precision else dtype
