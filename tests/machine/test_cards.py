"""Cards: the limits of the specification, and the names that CUDA gives."""

import pytest

from phase1.machine.cards import CARDS, card_for, card_named

GIB = 2**30


def test_the_usable_bytes_of_8_and_10_gb_are_those_of_the_verdicts():
    assert CARDS["rtx4060"].usable_bytes == 7_200_000_000
    assert CARDS["rtx3080"].usable_bytes == 9_000_000_000


def test_there_are_at_least_20_consumer_cards_and_all_numbers_are_in_range():
    assert sum("GeForce" in card.name for card in CARDS.values()) >= 20
    for key, card in CARDS.items():
        assert card.key == key
        assert 0.8 * card.memory_bytes < card.usable_bytes < 0.9 * card.memory_bytes
        assert 1.5e13 < card.fp16_flops < 1e15 and 1.9e11 < card.bandwidth_bytes_per_s < 5e12
        assert card_named(card.name, card.memory_bytes) == card


@pytest.mark.parametrize(
    "key, tflops",  # with FP32 sums, from NVIDIA's white papers and data sheets
    [
        ("rtx2080ti", 53.8),
        ("rtx3090", 71),
        ("rtx4090", 165.2),
        ("rtx5080", 112.6),
        ("rtx5090", 209.5),
        ("a10", 125),
        ("h100", 989),
    ],
)
def test_the_peak_is_that_of_fp32_sums(key, tflops):
    assert CARDS[key].fp16_flops == pytest.approx(tflops * 1e12, rel=5e-3)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx4060-laptop"),
        ("NVIDIA GeForce RTX 4060", "rtx4060"),
        ("GeForce RTX 2080 Ti", "rtx2080ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070ti-super"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti-8gb"),
    ],
)
def test_device_names_find_their_card(name, key):
    assert card_named(name) == CARDS[key]


@pytest.mark.parametrize(
    "name", ["", "NVIDIA", "AMD Radeon RX 7900 XTX", "NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 40"]
)
def test_an_unknown_device_has_no_card(name):
    assert card_named(name) is None


def test_memory_tells_cards_of_one_name_apart():
    assert card_named("NVIDIA GeForce RTX 4060 Ti", 16_380 * 2**20) == CARDS["rtx4060ti-16gb"]
    assert card_named("NVIDIA GeForce RTX 4060 Ti", 8188 * 2**20) == CARDS["rtx4060ti-8gb"]
    assert card_named("NVIDIA GeForce RTX 3080", 12 * GIB) is None  # another chip than the listed 10 GB card
    assert card_named("Tesla T4", 15_360 * 2**20) == CARDS["t4"]  # ECC takes a sixteenth


@pytest.mark.parametrize("key", ["rtx4060ti-16gb", "RTX 4060 Ti 16GB", "RTX4060TI_16GB"])
def test_case_and_punctuation_of_a_key_do_not_matter(key):
    assert card_for(key) == CARDS["rtx4060ti-16gb"]


def test_an_unknown_key_is_answered_with_those_near_it():
    with pytest.raises(
        ValueError, match=r"--card must be one of the known cards; got 'rtx4060ti'; try rtx4060ti-8gb, rtx4060ti-16gb$"
    ):
        card_for("rtx4060ti")
    with pytest.raises(ValueError, match="try .*rtx3080"):
        card_for("rtx3800")
