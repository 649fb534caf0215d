"""Cards by name: memory and memory bandwidth, as their makers state them; this machine's own; or typed.

Memory in GiB and bandwidth in GB/s (10⁹ bytes) are NVIDIA's published specifications. The share of the memory that programs can have
is an assumption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from comparator.core.errors import UserError

HERE = "this machine"
_USABLE = 0.985  # of a card's nominal memory: what the driver leaves to programs
_TYPED = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:gb|gib)(?:\s*@\s*(\d+(?:\.\d+)?)\s*(gb|tb)(?:/s)?)?", re.IGNORECASE
)
# name: (GiB, GB/s)
_TABLE = {
    "RTX 3060 12GB": (12, 360),
    "RTX 3090": (24, 936),
    "RTX 4060 Ti 16GB": (16, 288),
    "RTX 4070": (12, 504),
    "RTX 4080": (16, 717),
    "RTX 4090": (24, 1008),
    "RTX 5070 Ti": (16, 896),
    "RTX 5080": (16, 960),
    "RTX 5090": (32, 1792),
    "RTX A6000": (48, 768),
    "RTX 6000 Ada": (48, 960),
    "RTX PRO 6000 Blackwell": (96, 1792),
    "T4": (16, 320),
    "V100 32GB": (32, 900),
    "L4": (24, 300),
    "A10": (24, 600),
    "L40S": (48, 864),
    "A100 40GB": (40, 1555),
    "A100 80GB": (80, 2039),
    "H100 PCIe": (80, 2000),
    "H100 SXM": (80, 3350),
    "H200": (141, 4800),
    "B200": (180, 8000),
}


@dataclass(frozen=True)
class Card:
    """`memory_bytes`: what programs can have; `bytes_s`: memory bandwidth, None where it is not known. `device`: "cuda" or
    "cpu", by which backends tell their kernels. `source`: where the figures are from."""

    name: str
    memory_bytes: int
    bytes_s: float | None
    device: str
    source: str


def names() -> list[str]:
    """This machine first."""
    return [HERE, *_TABLE]


def find(text: str | None) -> Card:
    """A card by its name, whatever the case and without the maker; "24GB@1008GB/s"; or this machine for None.

    Raises `UserError` with the names that are known.
    """
    wanted = (text or HERE).strip()
    if wanted.lower() == HERE:
        return here()
    if typed := _TYPED.fullmatch(wanted):
        rate = float(typed[2]) * (1e12 if typed[3].lower() == "tb" else 1e9) if typed[2] else None
        return Card(wanted, int(float(typed[1]) * _USABLE * 2**30), rate, "cuda", "typed")
    plain = _plain(wanted)
    matches = [name for name in _TABLE if _plain(name) == plain] or [
        name for name in _TABLE if plain and _plain(name).startswith(plain)
    ]
    if len(matches) != 1:
        several = (
            f"“{wanted}” can be {' or '.join(matches)}."
            if matches
            else f"No card is called “{wanted[:60]}” here."
        )
        raise UserError(several, f"Known: {', '.join(_TABLE)}. Or type memory and bandwidth: 24GB@1008GB/s")
    size, rate = _TABLE[matches[0]]
    return Card(matches[0], int(size * _USABLE * 2**30), rate * 1e9, "cuda", "published specification")


def here() -> Card:
    """The GPU with the most free memory, its bandwidth measured with a copy; else the CPU, whose bandwidth is not measured."""
    from comparator.engine.placement import pick_device
    from comparator.metrics import bandwidth, environment, memory

    device = pick_device()
    total, _ = memory.device_total_and_free(device)
    name = environment.read(device).device if device.startswith("cuda") else "this machine's CPU"
    return Card(name, total, bandwidth.copy_bytes_s(device), device.partition(":")[0], "measured here")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))
