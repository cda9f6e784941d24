"""What chips can do: one table, with its sources, for MFU and for the planner.

All figures are of one chip, bf16 without sparsity, in FLOP/s, bytes and bytes/s. `link` is what one chip sends to its
neighbours along one ring in both directions; `network` is its share of the network between slices or nodes.

NVIDIA: data sheets (H100 and H200 SXM: NVLink 450 GB/s each way, one 400 Gb/s adapter a card in DGX/HGX systems);
memory of H100 and H200 as their driver reports it. TPU: cloud.google.com/tpu/docs, pages v4 to tpu7x ("peak compute
per chip (bf16)", HBM, which is in GiB, HBM bandwidth, ICI), and Austin et al. 2025, "How to Scale Your Model", part 2,
table of TPU specs, for links and the data-centre network; v5p's memory as its compiler gives it.
"""

from dataclasses import dataclass

GB = 1e9
GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """`devices` JAX devices share one chip; 0 where a figure is not known to us."""

    peak: float
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    devices: int = 1


CHIPS = {
    "H100 PCIe": Chip(756e12, 80 * GB, 2000 * GB, 64 * GB, 50 * GB),
    "H100 NVL": Chip(835e12, 94 * GB, 3938 * GB, 300 * GB, 50 * GB),
    "H100": Chip(989e12, 84.978434048 * GB, 3352.32 * GB, 450 * GB, 50 * GB),
    "H200": Chip(989e12, 150.75482 * GB, 4800 * GB, 450 * GB, 50 * GB),
    "B200": Chip(2250e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB),
    "A100": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB),
    "A100 40GB": Chip(312e12, 40 * GB, 1555 * GB, 300 * GB, 25 * GB),
    "A10": Chip(125e12, 24 * GB, 600 * GB),
    "L40S": Chip(362e12, 48 * GB, 864 * GB),
    "L40": Chip(181e12, 48 * GB, 864 * GB),
    "L4": Chip(121e12, 24 * GB, 300 * GB),
    "TPU v2": Chip(45e12, devices=2),
    "TPU v3": Chip(123e12, devices=2),
    "TPU v4 lite": Chip(138e12),
    "TPU v4": Chip(275e12, 32 * GIB, 1228 * GB, 90 * GB, 6.25 * GB),
    "TPU v5e": Chip(197e12, 16 * GIB, 819 * GB, 90 * GB, 3.125 * GB),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2765 * GB, 180 * GB, 6.25 * GB),
    "TPU v6": Chip(918e12, 32 * GIB, 1638 * GB, 180 * GB, 12.5 * GB),
    "TPU7x": Chip(2307e12, 192 * GIB, 7380 * GB, 200 * GB, 12.5 * GB, devices=2),
}

# JAX `device_kind`: name above. Exact, since names begin with one another's (L4, L40; A10, A100, A1000) and a partition
# of a chip (MIG) carries the name of the whole.
KINDS = {
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A100-PCIE-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A10": "A10",
    "NVIDIA L40S": "L40S",
    "NVIDIA L40": "L40",
    "NVIDIA L4": "L4",
    "TPU v2": "TPU v2",
    "TPU v3": "TPU v3",
    "TPU v4 lite": "TPU v4 lite",
    "TPU v4": "TPU v4",
    "TPU v5 lite": "TPU v5e",
    "TPU v5e": "TPU v5e",
    "TPU v5": "TPU v5",
    "TPU v5p": "TPU v5",
    "TPU v6 lite": "TPU v6",
    "TPU v6e": "TPU v6",
    "TPU7x": "TPU7x",
    "TPU v7": "TPU7x",
    "TPU v7x": "TPU7x",
}


def find(device_kind: str) -> Chip | None:
    """The chip of a JAX device, or None for a kind that is not in the table."""
    return CHIPS.get(KINDS.get(device_kind, ""))
