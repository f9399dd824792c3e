"""The cards people train on: memory, and peak arithmetic and bandwidth from the makers' sheets."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

USABLE_SHARE = 0.9  # of the advertised size: 7.2e9 bytes of 8 GB, 9.0e9 of 10 GB (docs/design.md, "Definitions")


class Chip(NamedTuple):
    """Compute capability, and the number of multiprocessors if known."""

    major: int
    minor: int
    multiprocessors: int | None = None


@dataclass(frozen=True)
class Card:
    """One card; the sizes are nominal, what a driver reports is up to 7 % below `memory_bytes` (firmware, ECC).

    memory_bytes: the memory chips, "8 GB" on the box being 8 GiB.
    usable_bytes: 90 % of the decimal size, 7.2e9 for 8 GB: what the project's verdicts leave to one process that shares the
        card with a desktop. The rule is the same for all cards, also for those that drive no display.
    fp16_flops: operations per second of dense FP16 matrix products summed in FP32, at the boost clock of the sheet.
    bandwidth_bytes_per_s: of the card's memory.
    """

    key: str
    name: str
    memory_bytes: int
    usable_bytes: int
    fp16_flops: float
    bandwidth_bytes_per_s: float
    chip: Chip

    @property
    def gigabytes(self) -> int:
        """The memory in GB as it is advertised."""
        return round(self.memory_bytes / 2**30)

    @property
    def title(self) -> str:
        """The maker's name and the size, where the name does not say it."""
        plain = re.sub(r"^NVIDIA (GeForce )?", "", self.name)
        return plain if re.search(r"\d ?GB", plain) else f"{plain} {self.gigabytes} GB"


# FP16 products summed in FP32, per multiprocessor and clock. GeForce cards do half of the rate with FP16 sums, which is 1024
# from Turing on. TFLOPS with FP32 (FP16) sums in NVIDIA's architecture white papers: Turing (2018), 2080 Ti 53.8 (107.6),
# 2070 29.9 (59.7); GA102 (2020), 3090 71 (142), 3080 59.5 (119); Ada (2022), 4090 165.2 (330.3), 4080 97.5 (194.9); RTX
# Blackwell (2025), 5090 209.5 (419), 5080 112.6 (225.1). GTX cards are not listed: they have no tensor cores.
_GEFORCE_FLOP = 512

# key, name, GB, multiprocessors, boost MHz, GB/s. Of a laptop card, whose clock depends on the power it is given, the highest
# boost clock that NVIDIA lists. A later revision of the same name (RTX 3060 Ti with GDDR6X, RTX 4070 with GDDR6) is not listed.
_GEFORCE: tuple[tuple[str, str, int, int, int, float], ...] = (
    ("rtx2060", "RTX 2060", 6, 30, 1680, 336),
    ("rtx2060-super", "RTX 2060 SUPER", 8, 34, 1650, 448),
    ("rtx2070", "RTX 2070", 8, 36, 1620, 448),
    ("rtx2070-super", "RTX 2070 SUPER", 8, 40, 1770, 448),
    ("rtx2080", "RTX 2080", 8, 46, 1710, 448),
    ("rtx2080-super", "RTX 2080 SUPER", 8, 48, 1815, 496),
    ("rtx2080ti", "RTX 2080 Ti", 11, 68, 1545, 616),
    ("rtx3050", "RTX 3050", 8, 20, 1777, 224),
    ("rtx3060", "RTX 3060", 12, 28, 1777, 360),
    ("rtx3060ti", "RTX 3060 Ti", 8, 38, 1665, 448),
    ("rtx3070", "RTX 3070", 8, 46, 1725, 448),
    ("rtx3070ti", "RTX 3070 Ti", 8, 48, 1770, 608),
    ("rtx3080", "RTX 3080", 10, 68, 1710, 760),
    ("rtx3080ti", "RTX 3080 Ti", 12, 80, 1665, 912),
    ("rtx3090", "RTX 3090", 24, 82, 1695, 936),
    ("rtx3090ti", "RTX 3090 Ti", 24, 84, 1860, 1008),
    ("rtx3060-laptop", "RTX 3060 Laptop GPU", 6, 30, 1702, 336),
    ("rtx3070-laptop", "RTX 3070 Laptop GPU", 8, 40, 1620, 448),
    ("rtx3080-laptop-8gb", "RTX 3080 Laptop GPU", 8, 48, 1710, 448),
    ("rtx3080-laptop-16gb", "RTX 3080 Laptop GPU", 16, 48, 1710, 448),
    ("rtx4060", "RTX 4060", 8, 24, 2460, 272),
    ("rtx4060ti-8gb", "RTX 4060 Ti", 8, 34, 2535, 288),
    ("rtx4060ti-16gb", "RTX 4060 Ti", 16, 34, 2535, 288),
    ("rtx4070", "RTX 4070", 12, 46, 2475, 504),
    ("rtx4070-super", "RTX 4070 SUPER", 12, 56, 2475, 504),
    ("rtx4070ti", "RTX 4070 Ti", 12, 60, 2610, 504),
    ("rtx4070ti-super", "RTX 4070 Ti SUPER", 16, 66, 2610, 672),
    ("rtx4080", "RTX 4080", 16, 76, 2505, 717),
    ("rtx4080-super", "RTX 4080 SUPER", 16, 80, 2550, 736),
    ("rtx4090", "RTX 4090", 24, 128, 2520, 1008),
    ("rtx4050-laptop", "RTX 4050 Laptop GPU", 6, 20, 2370, 192),
    ("rtx4060-laptop", "RTX 4060 Laptop GPU", 8, 24, 2370, 256),
    ("rtx4070-laptop", "RTX 4070 Laptop GPU", 8, 36, 2175, 256),
    ("rtx5060", "RTX 5060", 8, 30, 2497, 448),
    ("rtx5060ti-8gb", "RTX 5060 Ti", 8, 36, 2572, 448),
    ("rtx5060ti-16gb", "RTX 5060 Ti", 16, 36, 2572, 448),
    ("rtx5070", "RTX 5070", 12, 48, 2512, 672),
    ("rtx5070ti", "RTX 5070 Ti", 16, 70, 2452, 896),
    ("rtx5080", "RTX 5080", 16, 84, 2617, 960),
    ("rtx5090", "RTX 5090", 32, 170, 2407, 1792),
)

_CAPABILITY = {"20": (7, 5), "30": (8, 6), "40": (8, 9), "50": (12, 0)}  # of the GeForce RTX series

# key, device names, GB, TFLOPS, GB/s, chip, from NVIDIA's data sheets; FP32 sums cost these cards nothing. Sheets that state
# the rate with sparsity (L4, L40S, RTX 6000 Ada, Hopper) are halved.
_PROFESSIONAL: tuple[tuple[str, tuple[str, ...], int, float, float, tuple[int, int, int]], ...] = (
    ("v100-16gb", ("Tesla V100-SXM2-16GB",), 16, 125, 900, (7, 0, 80)),
    ("v100-32gb", ("Tesla V100-SXM2-32GB",), 32, 125, 900, (7, 0, 80)),
    ("t4", ("Tesla T4",), 16, 65, 320, (7, 5, 40)),
    ("a10", ("NVIDIA A10",), 24, 125, 600, (8, 6, 72)),
    ("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40, 312, 1555, (8, 0, 108)),
    ("a100-80gb", ("NVIDIA A100-SXM4-80GB",), 80, 312, 2039, (8, 0, 108)),
    ("a100-80gb-pcie", ("NVIDIA A100 80GB PCIe",), 80, 312, 1935, (8, 0, 108)),
    ("rtx-a6000", ("NVIDIA RTX A6000",), 48, 154.8, 768, (8, 6, 84)),
    ("l4", ("NVIDIA L4",), 24, 121, 300, (8, 9, 58)),
    ("l40s", ("NVIDIA L40S",), 48, 362, 864, (8, 9, 142)),
    ("rtx6000-ada", ("NVIDIA RTX 6000 Ada Generation",), 48, 364.2, 960, (8, 9, 142)),
    ("h100", ("NVIDIA H100 80GB HBM3",), 80, 989.4, 3352, (9, 0, 132)),
    ("h100-pcie", ("NVIDIA H100 PCIe",), 80, 756.5, 2039, (9, 0, 114)),
    ("h200", ("NVIDIA H200",), 141, 989.4, 4800, (9, 0, 132)),
)


def _card(key: str, name: str, gigabytes: int, fp16_flops: float, bandwidth: float, chip: Chip) -> Card:
    usable = round(USABLE_SHARE * gigabytes * 10**9)
    return Card(key, name, gigabytes * 2**30, usable, fp16_flops, bandwidth * 1e9, chip)


def _cards() -> Iterator[tuple[str, Card]]:
    """Every card with a name that CUDA gives it."""
    for key, name, gigabytes, multiprocessors, mhz, bandwidth in _GEFORCE:
        device = f"NVIDIA GeForce {name}"
        chip = Chip(*_CAPABILITY[key[3:5]], multiprocessors)
        yield device, _card(key, device, gigabytes, multiprocessors * mhz * 1e6 * _GEFORCE_FLOP, bandwidth, chip)
    for key, devices, gigabytes, tflops, bandwidth, chip_numbers in _PROFESSIONAL:
        for device in devices:
            yield device, _card(key, devices[0], gigabytes, tflops * 1e12, bandwidth, Chip(*chip_numbers))


CARDS: dict[str, Card] = {card.key: card for _, card in _cards()}
"""Every known card by key, as `--card` takes it."""


def card_named(gpu_name: str, memory_bytes: int | None = None) -> Card | None:
    """The card that `torch.cuda.get_device_name()` calls `gpu_name`, or None for one that is not in `CARDS`.

    Two sizes of one name (RTX 4060 Ti) are told apart by `memory_bytes`, what the driver reports; a card more than 10 % off
    every listed size is another card, and unknown. Without it, the smallest of the name.
    """
    cards = [card for device, card in _cards() if _plain(device) == _plain(gpu_name)]
    if memory_bytes is not None:
        cards = [card for card in cards if 0.9 * card.memory_bytes <= memory_bytes <= card.memory_bytes]
    return min(cards, key=lambda card: card.memory_bytes, default=None)


def card_for(text: str) -> Card:
    """The card that `--card` names: by key, by the name of the driver or the shop, by number, with or without its size.

    "rtx4060ti-16gb", "NVIDIA GeForce RTX 4060 Ti 16GB", "4060 ti 16g", "RTX 3080 Mobile 8GB", and the presets of that card.
    Raises ValueError for a name of no card or of several.
    """
    by_letters = {_letters(known): card for known, card in CARDS.items()}
    if found := by_letters.get(_letters(text)):
        return found
    name, size = _name_and_size(text)
    matching = {card.key: card for alias, card in _aliases() if alias == name and size in (None, card.gigabytes)}
    if len(matching) == 1:
        return next(iter(matching.values()))
    others = [card.key for alias, card in _aliases() if alias == name]  # of another size
    near = list(matching) or list(dict.fromkeys(others)) or [
        by_letters[letters].key for letters in difflib.get_close_matches(_letters(text), by_letters, n=5)
    ]  # fmt: skip
    advice = f"try {', '.join(near)}" if near else "phase1 memory --card list names them"
    raise ValueError(f"--card must be one of the known cards; got {text[:80]!r}; {advice}")


def _aliases() -> Iterator[tuple[str, Card]]:
    """Every name of every card without its size, as `_name_and_size` gives it; those of GeForce by their number too."""
    for device, card in _cards():
        for name in {_name_and_size(device)[0], _name_and_size(card.key)[0]}:
            yield name, card
            if name.startswith("rtx"):
                yield name.removeprefix("rtx"), card


def _name_and_size(text: str) -> tuple[str, int | None]:
    """Letters and digits of the name without brand, bus and size; and the size in GB, if it is there."""
    text = re.sub(r"nvidia|geforce|tesla|quadro|graphics|card|generation|hbm\d?e?|sxm\d?", " ", text.lower())
    text = re.sub(r"\blaptop( gpu)?\b|\bmobile\b|(?<=\d)m\b", "laptop", text)
    found = re.search(r"(?<![\d])(\d{1,3})\s*g(i?b)?\b", text)
    if found:
        text = text.replace(found[0], " ")
    name = _letters(re.sub(r"\bgpu\b", " ", text))
    return name, int(found[1]) if found else None


def _plain(device: str) -> str:
    """The name without its brand, which drivers before 2021 leave out."""
    return re.sub(r"^(nvidia|geforce|tesla|\s)+", "", device.lower()).strip()


def _letters(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())
