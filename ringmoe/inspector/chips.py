"""What each chip can do per second, from its maker's public figures."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one chip. Rates are dense, per second; `sources` says where each comes
    from.

    `matmul_flops` is by HLO dtype. "f32" is the rate at JAX's default matmul precision (bf16 passes
    on TPU, TF32 on GPU) and "f32_highest" at `jax.lax.Precision.HIGHEST`. `link_bandwidth` is
    bytes/s in one direction of one link. `clock_hz` is that of a TPU's core, at which its matrix units, squares of
    `matrix_unit`, reach the matmul rate; 0 and 0 where that isn't how it is built.
    """

    kind: str
    matmul_flops: Mapping[str, float]
    vector_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    num_links: int
    link_bandwidth: float
    sources: Mapping[str, str]
    devices_per_chip: int = 1
    device_kinds: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    clock_hz: float = 0.0
    matrix_unit: int = 0


def _tpu(
    bf16: float,
    int8: float,
    hbm_gib: float,
    hbm_gb_s: float,
    links: int,
    link_gb_s: float,
    cores: int,
    clock_ghz: float,
    page: str,
    kinds: tuple[str, ...],
    fp8: float | None = None,
    devices_per_chip: int = 1,
    matrix_unit: int = 128,
) -> Chip:
    """A TPU chip from its documented figures; the clock is the one at which its matrix units reach
    the matmul rate."""
    rates = {
        "bf16": bf16,
        "f16": bf16,
        "f32": bf16,
        "f32_highest": bf16 / 6,
        "s8": int8,
        "u8": int8,
        "s4": int8,
        "f8": fp8 or bf16,
        "f4": fp8 or bf16,
    }
    documented = f"Google Cloud TPU documentation, {page}, key chip specifications"
    sources = {
        "matmul_flops": documented + "; f32_highest: six bf16 passes",
        "hbm_bytes": documented,
        "hbm_bandwidth": documented,
        "num_links": documented + " (ICI ports)",
        "link_bandwidth": documented + " (bidirectional ICI bandwidth / ports / 2)",
        "vector_flops": f"derived: {cores} cores x 8 x 128 lanes x 4 ALUs x {clock_ghz} GHz (bf16 rate / 2 / matrix units)",
    }
    shapes = _SHAPES_2D if links == 4 else _SHAPES_3D
    return Chip(
        "tpu",
        MappingProxyType({k: v * _TERA for k, v in rates.items()}),
        cores * 4096 * clock_ghz * _GIGA,
        hbm_gib * _GIB,
        hbm_gb_s * _GIGA,
        links,
        link_gb_s * _GIGA,
        MappingProxyType(sources),
        devices_per_chip,
        kinds,
        shapes,
        clock_ghz * _GIGA,
        matrix_unit,
    )


def _gpu(
    bf16: float,
    fp8: float,
    tf32: float,
    fp32: float,
    fp64: float,
    fp4: float,
    hbm_bytes: float,
    hbm_gb_s: float,
    link_gb_s: float,
    sheet: str,
    kinds: tuple[str, ...],
    shapes: tuple[str, ...] = ("", "x8", "x64"),
) -> Chip:
    """An NVIDIA GPU from its data sheet; 18 NVLinks to a switch that connects all GPUs of its
    domain, see networks.py."""
    rates = {
        "bf16": bf16,
        "f16": bf16,
        "f32": tf32,
        "f32_highest": fp32,
        "s8": fp8,
        "u8": fp8,
        "f8": fp8,
        "f4": fp4,
        "f64": fp64,
    }
    source = f"NVIDIA {sheet} data sheet, dense rates"
    sources = dict.fromkeys(("matmul_flops", "vector_flops", "hbm_bandwidth", "num_links"), source)
    sources |= {
        "hbm_bytes": "device_memory_size of the packaged spec file",
        "link_bandwidth": f"NVIDIA {sheet} data sheet (NVLink total / 18 links / 2 directions)",
    }
    return Chip(
        "gpu",
        MappingProxyType({k: v * _TERA for k, v in rates.items()}),
        fp32 * _TERA,
        hbm_bytes,
        hbm_gb_s * _GIGA,
        18,
        link_gb_s * _GIGA,
        MappingProxyType(sources),
        1,
        kinds,
        shapes,
    )


# Slices that Cloud TPU documents or that a ring would be tried on; libtpu takes other multiples of
# a host's chips too.
_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES_3D = (
    "1x1x1",
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
    "16x16x24",
)

_hopper = functools.partial(_gpu, 989.4, 1978.9, 494.7, 66.9, 66.9, 1978.9)

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": _tpu(275, 275, 32, 1228, 6, 50, 2, 1.05, "TPU v4", ("TPU v4",), devices_per_chip=2),
        "v5e": _tpu(197, 393, 16, 819, 4, 50, 1, 1.5, "TPU v5e", ("TPU v5 lite", "TPU v5e")),
        "v5p": _tpu(459, 918, 95, 2765, 6, 100, 2, 1.75, "TPU v5p", ("TPU v5", "TPU v5p")),
        "v6e": _tpu(918, 1836, 32, 1640, 4, 100, 1, 1.75, "TPU v6e", ("TPU v6 lite", "TPU v6e"), matrix_unit=256),
        "tpu7x": _tpu(
            2307, 2307, 192, 7380, 6, 100, 2, 2.2, "TPU7x", ("TPU7x",), fp8=4614, devices_per_chip=2, matrix_unit=256
        ),
        "h100": _hopper(85520809984, 3350, 25, "H100 SXM5", ("NVIDIA H100",)),
        "h200": _hopper(151397597184, 4800, 25, "H200 SXM", ("NVIDIA H200",)),
        "b200": _gpu(2250, 4500, 1125, 75, 37, 9000, 191503138816, 8000, 50, "HGX B200", ("NVIDIA B200",)),
        "gb200": _gpu(
            2500,
            5000,
            1250,
            80,
            40,
            10000,
            197897748480,
            8000,
            50,
            "GB200 NVL72",
            ("NVIDIA GB200",),
            ("", "x8", "x72", "x144"),
        ),
        "cpu": Chip(
            "cpu",
            MappingProxyType({"bf16": 0.35 * _TERA, "f32": 0.17 * _TERA}),
            0.1 * _TERA,
            16 * _GIB,
            20 * _GIGA,
            1,
            10 * _GIGA,
            MappingProxyType(
                dict.fromkeys(
                    (
                        "matmul_flops",
                        "vector_flops",
                        "hbm_bytes",
                        "hbm_bandwidth",
                        "num_links",
                        "link_bandwidth",
                    ),
                    "nominal small host, to read schedules by; not a measurement of this machine",
                )
            ),
            device_kinds=("cpu",),
            shapes=("",),
        ),
    }
)


def chip_of(device_kind: str) -> str | None:
    """The name in CHIPS of what JAX calls `device_kind`, None if there is none: the longest match, as "TPU v5 lite" also
    begins with "TPU v5"."""
    names = [(len(k), chip) for chip, spec in CHIPS.items() for k in spec.device_kinds if device_kind.startswith(k)]
    return max(names)[1] if names else None
