"""What `ringmoe targets` prints: the machines, their figures, and where those come from."""

from rich.console import Console
from rich.table import Table

from ringmoe.inspector import machines


def print_targets(console: Console) -> None:
    """Figures by chip, then the names, then where the figures come from."""
    table = Table(box=None, pad_edge=False)
    for title in (
        "chip",
        "devices",
        "bf16",
        "int8",
        "fp8",
        "f32",
        "HBM",
        "HBM rate",
        "links",
        "link, one way",
        "joined by links",
        "network, one way",
    ):
        table.add_column(title, justify="left" if title == "chip" else "right")
    groups = {
        chip: [name for name in machines.targets() if machines.target(name).chip == chip] for chip in machines.CHIPS
    }
    for chip, names in groups.items():
        one = machines.target(names[0])
        rates = [
            f"{one.matmul_flops[key] / 1e12:.4g} T" if key in one.matmul_flops else ""
            for key in ("bf16", "s8", "f8", "f32")
        ]
        table.add_row(
            chip,
            str(machines.CHIPS[chip].devices_per_chip),
            *rates,
            f"{one.hbm_bytes / 2**30:.4g} GiB",
            f"{one.hbm_bandwidth / 1e9:.4g} GB/s",
            str(one.num_links),
            f"{one.link_bandwidth / 1e9:.4g} GB/s",
            f"{machines.NETWORKS[chip].domain} GPUs" if one.kind == "gpu" else "a slice" if one.kind == "tpu" else "",
            f"{one.network_bandwidth / 1e9:.4g} GB/s",
        )
    console.print(
        "Dense FLOP/s, memory, bandwidth and network of one device; links of one chip.",
        table,
        "",
        sep="\n",
        highlight=False,
    )
    console.print(
        "Names for --target (libtpu takes other TPU shapes too; 2*v5p:4x4x4 is two slices; a GPU name takes any count "
        "that links join, as h200x4, and whole multiples of that, as h200x24):"
    )
    for names in groups.values():
        console.print("  " + "  ".join(names), highlight=False)
    console.print("\nWhere the figures come from:")
    for chip, names in groups.items():
        sources = machines.target(names[0]).sources
        for source in dict.fromkeys(sources.values()):
            figures = ", ".join(name for name, value in sources.items() if value == source)
            console.print(f"  {chip}: {figures}: {source}", highlight=False, markup=False)
