"""The last screen: short, the failures first, nothing of a file interpreted by a terminal."""

import pytest

from phase1.records.schema import Check
from phase1.tables.screen import (
    LINES,
    Screen,
    claim,
    memory_numbers,
    model_title,
    perplexity_numbers,
    text,
    throughput_numbers,
    values_of,
)
from tests.reports import memory_report, perplexity_report, throughput_report


def check(name, status="pass", detail="because of that"):
    return Check(name=name, value=1.0, limit=2.0, status=status, detail=detail)


@pytest.mark.parametrize("checks", [0, 1, 5, 40])
@pytest.mark.parametrize("numbers", [0, 3, 60])
@pytest.mark.parametrize("files", [0, 2, 30])
def test_it_has_at_most_25_lines(checks, numbers, files):
    screen = Screen(
        question="Does it? " * 30,
        numbers=[f"number {i}" for i in range(numbers)],
        checks=[check(f"check_{i}", "fail", "a long reason " * 40) for i in range(checks)],
        next=["one", "two", "three", "four"],
        files=[f"folder{i % 7}/file{i}" for i in range(files)],
        failed_steps=[("perplexity", "no network " * 20)],
    )
    shown = text(screen).splitlines()
    assert len(shown) <= LINES
    assert any("FAIL" in line for line in shown) and any("did not run" in line for line in shown)


def test_failures_come_first_with_their_reason_and_the_answer_counts():
    shown = text(Screen("Q", checks=[check("a"), check("b", "inconclusive", "too few"), check("c", "fail", "too much")]))
    lines = [line.split()[0] for line in shown.splitlines() if line.split()]
    assert lines == ["Q", "FAIL", "too", "INCONCLUSIVE", "too", "PASS", "FAIL:"]
    assert shown.endswith("FAIL: 1 of 3 checks pass, 1 failed, 1 undecided")
    assert text(Screen("Q", checks=[check("a")])).endswith("PASS: 1 of 1 checks pass")


def test_a_command_is_one_line_to_copy():
    command = "phase1 memory" + " --flag 1" * 60
    assert f"next  {command}" in text(Screen("Q", next=[command])).splitlines()


@pytest.mark.parametrize("peaks, says", [([2 * 10**9, 3 * 10**9], "2.00 3.00 GB"), ([n * 10**9 for n in range(1, 10)], "1.00 to 9.00 GB")])
def test_memory_of_several_ranks_is_shown_by_rank(peaks, says):
    report = memory_report()
    results = {key: result.model_copy(update={"peak_by_rank_bytes": peaks}) for key, result in report.results.items()}
    lines = memory_numbers(report.model_copy(update={"results": results}))
    assert sum("by rank" in line and line.endswith(says) for line in lines) == len(results)
    assert not any("by rank" in line for line in memory_numbers(report))


def test_names_of_files_are_harmless():
    shown = text(Screen("Q\x1b[2J", numbers=["a\x1b[2Jb\n"], checks=[check("x\x1b")], files=["d/\x1b[2J"], next=["\x1b"], answer="\x1b"))
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "name, words",
    [
        ("fits_8gb", "engine fits an 8 GB card"),
        ("fits_10gb", "engine fits a 10 GB card"),
        ("phase1_htt16_ar32_within_5_percent", "engine, HTT 16 / AR-SSM 32: perplexity"),
        ("phase1_htt16_ar32_seed1_within_5_percent", "engine, HTT 16 / AR-SSM 32, seed 1: perplexity"),
        ("a_a_no_difference", "two copies of one model agree"),
    ],
)
def test_claims_are_words(name, words):
    assert claim(name) == words


def test_every_report_has_its_numbers():
    assert model_title("phase1") == "engine"
    assert any("2.31 GB" in line and "75.0 %" in line for line in memory_numbers(memory_report()))
    assert any("OOM" in line for line in throughput_numbers(throughput_report()))
    assert any("37.06" in line and "+6.20 %" in line for line in perplexity_numbers(perplexity_report()))


def test_a_batch_is_a_whole_number():
    one = Check(name="one_sequence_trains", value=52, limit=1, status="pass", detail="")
    assert values_of(one) == ("52", "least 1")
