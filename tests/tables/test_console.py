from phase1.records.schema import Check, MemoryResult
from phase1.tables.console import checks_text, memory_text, perplexity_text, throughput_text
from tests.reports import failed, memory_report, perplexity_report, throughput_report


def test_memory_is_printed_in_gb_and_gib_with_the_verdicts():
    text = memory_text(memory_report())
    for expected in ("9.26", "8.62", "(GiB)", "Fits 8 GB", "PASS", "FAIL", "75.0", "NVIDIA Test 10GB", "(measured)"):
        assert expected in text


def test_a_failure_is_printed_with_the_sizes_to_try():
    report = memory_report()
    report.results["baseline"] = MemoryResult(**failed("baseline"))
    text = memory_text(report)
    assert "OOM" in text and "try --batch-size 2" in text


def test_throughput_is_printed_with_its_scaling():
    text = throughput_text(throughput_report())
    for expected in ("97,524", "OOM", "O(N)", "1.0000", "39.06", "linear"):
        assert expected in text


def test_throughput_is_printed_with_its_intervals_and_one_copy_of_each_warning():
    report = throughput_report(warnings=["the room is on fire: leave"])
    engine = report.results["phase1"]
    first = engine.measurements[0].model_copy(
        update={"tokens_per_second_ci95": (90_000.0, 99_000.0), "ratio_ci95": (0.9, 0.99)}
    )
    report.results["phase1"] = engine.model_copy(
        update={"measurements": [first, *engine.measurements[1:]], "warnings": ["slow"]}
    )
    text = throughput_text(report)
    for expected in ("90,000 to 99,000", "0.900 to 0.990"):
        assert expected in text
    assert text.count("WARNING the room is on fire: leave") == text.count("WARNING phase1: slow") == 1


def test_perplexity_is_printed_with_its_interval_and_what_was_scored():
    text = perplexity_text(perplexity_report())
    for expected in ("37.06", "6.20", "5.40", "7.00", "FAIL", "250,000 tokens of wikipedia", "sha256 abababababab"):
        assert expected in text


def test_what_is_printed_fits_a_terminal():
    for text in (memory_text(memory_report()), throughput_text(throughput_report()), perplexity_text(perplexity_report())):
        assert max(len(line) for line in text.split("\n") if not line.startswith("- ")) <= 140


def test_checks_are_printed_once_with_verdict_value_limit_and_reason():
    assert "fits_8gb" not in memory_text(memory_report())
    text = checks_text(
        [*memory_report().checks, Check(name="odd", value=None, limit=None, status="inconclusive", detail="why")]
    )
    for expected in ("PASS", "fits_8gb", "2.81e9", "7.20e9", "75.05", "INCONCLUSIVE", "why"):
        assert expected in text


def test_no_checks_print_as_an_empty_table():
    assert "check" in checks_text([])


def test_terminal_escapes_in_a_record_are_not_printed():
    check = Check(name="a\x1b[31m", value=1.0, limit=None, status="fail", detail="x\x1b[0m\n" * 100)
    assert "\x1b" not in checks_text([check])
    report = memory_report(environment={"gpu": "card\x1b]0;title\x07"})
    assert "\x1b" not in memory_text(report)
