"""A device is the chip of its own name, never of one that begins like it."""

import pytest

from vgjax.planner import chips

GB = chips.GB


@pytest.mark.parametrize(
    "kind,peak,memory",
    [
        ("NVIDIA L4", 121e12, 24 * GB),
        ("NVIDIA L40", 181e12, 48 * GB),
        ("NVIDIA L40S", 362e12, 48 * GB),
        ("NVIDIA A10", 125e12, 24 * GB),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40 * GB),
        ("NVIDIA A100-SXM4-80GB", 312e12, 80 * GB),
        ("NVIDIA A100 80GB PCIe", 312e12, 80 * GB),
        ("NVIDIA H100 80GB HBM3", 989e12, 84.978434048 * GB),
        ("NVIDIA H100 PCIe", 756e12, 80 * GB),
        ("NVIDIA H100 NVL", 835e12, 94 * GB),
        ("TPU v5p", 459e12, 95.74 * chips.GIB),
        ("TPU v5e", 197e12, 16 * chips.GIB),
        ("TPU v6 lite", 918e12, 32 * chips.GIB),
    ],
)
def test_a_device_kind_is_exactly_its_chip(kind, peak, memory):
    chip = chips.find(kind)
    assert (chip.peak, chip.memory) == (peak, memory)


@pytest.mark.parametrize(
    "kind",
    [
        "NVIDIA A1000",
        "NVIDIA RTX A1000 6GB Laptop GPU",
        "NVIDIA A10G",
        "NVIDIA L400",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "TPU v50",
        "cpu",
        "",
    ],
)
def test_a_chip_that_is_not_in_the_table_is_unknown(kind):
    assert chips.find(kind) is None


def test_every_kind_names_a_chip():
    assert set(chips.KINDS.values()) == set(chips.CHIPS)
