from dataclasses import asdict, replace

import pytest

from phase1.config import ModelConfig
from phase1.records.schema import Ablation, Check, MemoryResult, PerplexityResult, ThroughputResult
from phase1.tables import (
    build_tables,
    configuration_comparison,
    memory_comparison,
    memory_tables,
    perplexity_comparison,
    scaling_comparison,
    throughput_comparison,
)
from phase1.tables.perplexity import pareto_front
from tests.reports import (
    MODELS,
    PARAMETERS,
    all_reports,
    common,
    failed,
    measurement,
    memory_report,
    memory_result,
    perplexity_report,
    perplexity_result,
    throughput_report,
    throughput_result,
)


def records(table):
    """The rows as dictionaries by heading."""
    return [dict(zip([column.heading for column in table.columns], row)) for row in table.rows]


def row_of(table, model):
    (row,) = [row for row in records(table) if row["Model"] == model]
    return row


def other_configuration(result, config_id="other"):
    return result.model_copy(update={"config_id": config_id, "config": result.config | {"loss": "other"}})


def test_memory_is_in_gb_and_gib_of_the_same_bytes():
    row = row_of(memory_comparison(memory_report()), "phase1")
    assert row["Peak allocated (GB)"] == 2.31
    assert row["Peak allocated (GiB)"] == pytest.approx(2_310_000_000 / 2**30)
    assert row["With context (GB)"] == pytest.approx(2.81)


def test_a_model_fits_by_reserved_memory_with_context_against_the_limit_of_the_check():
    table = memory_comparison(memory_report())
    assert [row["Fits 8 GB"] for row in records(table)] == ["FAIL", "PASS", "PASS"]
    report = memory_report()
    report.results["baseline"] = memory_result("baseline", 6_600_000_000)  # 7.1 GB with what is reserved and outside
    assert row_of(memory_comparison(report), "baseline")["Fits 8 GB"] == "PASS"
    report.results["baseline"] = memory_result("baseline", 6_800_000_000)
    assert row_of(memory_comparison(report), "baseline")["Fits 8 GB"] == "FAIL"


def test_the_verdict_on_the_engine_is_that_of_its_check():
    check = Check(name="fits_8gb", value=None, limit=7.2e9, status="inconclusive", detail="unknown")
    assert row_of(memory_comparison(memory_report(checks=[check])), "phase1")["Fits 8 GB"] == "INCONCLUSIVE"


def test_estimated_numbers_and_verdicts_say_so():
    results = {key: r.model_copy(update={"basis": "estimated"}) for key, r in memory_report().results.items()}
    table = memory_comparison(memory_report(results=results))
    assert {row["Basis"] for row in records(table)} == {"estimated"}
    assert [row["Fits 8 GB"] for row in records(table)] == ["FAIL (estimated)", "PASS (estimated)", "PASS (estimated)"]
    assert table.caption.endswith("(estimated)")


@pytest.mark.parametrize("status, word", [("oom", "OOM"), ("error", "FAIL")])
def test_a_failed_model_is_named_in_every_table(status, word):
    memory = memory_report()
    memory.results["baseline"] = MemoryResult(**failed("baseline", status))
    throughput = throughput_report()
    throughput.results["baseline"] = ThroughputResult(**failed("baseline", status))
    perplexity = perplexity_report()
    perplexity.results["baseline"] = PerplexityResult(**failed("baseline", status))
    tables = {t.name: t for t in build_tables({"memory": memory, "throughput": throughput, "perplexity": perplexity})}
    assert row_of(tables["memory_comparison"], "baseline")["Peak allocated (GB)"] == word
    assert row_of(tables["memory_comparison"], "baseline")["Fits 8 GB"] is None
    assert row_of(tables["scaling_comparison"], "baseline")["Verdict"] == word
    assert row_of(tables["perplexity_comparison"], "baseline")["Perplexity"] == word
    joined = row_of(tables["configuration_comparison"], "baseline")
    assert [joined[h] for h in ("Peak allocated (GB)", "Throughput (tokens/s)", "Perplexity")] == [word] * 3
    assert any("try --batch-size 2" in note for note in tables["memory_comparison"].notes)


def test_throughput_has_a_row_per_length_and_model_and_its_ratio():
    rows = records(throughput_comparison(throughput_report()))
    assert [(row["T (tokens)"], row["Model"]) for row in rows[:3]] == [(512, "baseline"), (512, "phase1"), (1024, "baseline")]
    assert rows[1]["Ratio to baseline (x)"] == pytest.approx(20 / 21)
    assert rows[0]["Ratio to baseline (x)"] == 1


def test_the_ratio_of_the_record_its_intervals_and_the_efficiency_are_in_the_table():
    report = throughput_report()
    update = {
        "tokens_per_second_ci95": (90_000.0, 99_000.0), "ratio_to_baseline": 0.951, "ratio_ci95": (0.94, 0.962), "mfu": 0.314,
        "achieved_flops_per_second": 3e14, "optimizer_bytes_per_second": 1.2e12,
    }  # fmt: skip
    engine = report.results["phase1"]
    measurements = [engine.measurements[0].model_copy(update=update), *engine.measurements[1:]]
    changes = {"measurements": measurements, "peak_basis": "1e15 FP16 FLOP/s"}
    report.results["phase1"] = engine.model_copy(update=changes)
    table = throughput_comparison(report)
    row, older = records(table)[1], records(table)[3]
    assert row["95 % (tokens/s)"] == (90_000.0, 99_000.0)
    assert (row["Ratio to baseline (x)"], row["95 % (x)"]) == (0.951, (0.94, 0.962))
    assert (row["Model FLOPs (GFLOP/s)"], row["MFU (%)"], row["Optimizer traffic (GB/s)"]) == (3e5, pytest.approx(31.4), 1200.0)
    assert older["Ratio to baseline (x)"] == pytest.approx(46 / 41) and older["95 % (x)"] is None
    assert "Peak: 1e15 FP16 FLOP/s." in table.notes


def test_controls_are_in_the_throughput_tables_and_not_among_the_configurations():
    report = throughput_report()
    for control in ("quadratic_control", "baseline_again"):
        report.results[control] = report.results["baseline"]
    for table in (throughput_comparison(report), scaling_comparison(report)):
        assert {"quadratic_control", "baseline_again"} <= {row["Model"] for row in records(table)}
    assert {row["Model"] for row in records(configuration_comparison({"throughput": report}))} == {"baseline", "phase1"}


def test_a_length_that_ran_out_of_memory_is_oom_and_gives_no_ratio():
    table = throughput_comparison(throughput_report())
    baseline, engine = [row for row in records(table) if row["T (tokens)"] == 4096]
    assert baseline["Throughput (tokens/s)"] == "OOM"
    assert engine["Ratio to baseline (x)"] is None
    assert any("baseline at T = 4096: OOM" in note for note in table.notes)


def test_a_ratio_is_never_taken_between_different_batch_sizes():
    report = throughput_report()
    slower = [m.model_copy(update={"batch_size": 2}) for m in report.results["phase1"].measurements]
    report.results["phase1"] = report.results["phase1"].model_copy(update={"measurements": slower})
    assert {row["Ratio to baseline (x)"] for row in records(throughput_comparison(report)) if row["Model"] == "phase1"} == {
        None
    }


def test_the_joined_speed_is_that_of_the_longest_length_and_its_ratio_that_of_the_same_size():
    report = throughput_report()
    report.results["baseline"] = throughput_result("baseline", [0.020, 0.046, 0.116, 0.322])
    row = row_of(configuration_comparison({"throughput": report}), "phase1")
    assert (row["At T (tokens)"], row["Ratio to baseline (x)"]) == (4096, pytest.approx(2.0))
    other_batch = [m.model_copy(update={"batch_size": 2}) for m in report.results["phase1"].measurements]
    report.results["phase1"] = report.results["phase1"].model_copy(update={"measurements": other_batch})
    assert row_of(configuration_comparison({"throughput": report}), "phase1")["Ratio to baseline (x)"] is None


def test_scaling_shows_order_fit_interval_share_and_verdict():
    row = row_of(scaling_comparison(throughput_report()), "phase1")
    assert (row["Order"], row["Verdict"], row["Lengths (tokens)"]) == ("O(N)", "linear", "512 to 4096 (4)")
    assert row["Coefficient (µs per position)"] == pytest.approx(39.06, abs=0.01)
    assert row["95 %"].low <= row["Exponent"] <= row["95 %"].high
    assert row["Quadratic share (%)"] == pytest.approx(0, abs=0.1)


def test_perplexity_shows_quality_tokens_and_verdict():
    row = row_of(perplexity_comparison(perplexity_report()), "phase1_htt16_ar32")
    assert (row["Perplexity"], row["Degradation (%)"], row["95 % (%)"]) == (37.06, 6.2, (5.4, 7.0))
    assert (row["Within 5 %"], row["Trained on (tokens)"], row["In the table"]) == ("FAIL", 90_000_000, 2_900_000)
    assert row_of(perplexity_comparison(perplexity_report()), "baseline")["Within 5 %"] is None


def test_an_untrained_model_shows_neither_perplexity_nor_verdict():
    report = perplexity_report()
    report.results["phase1_htt16_ar32"] = perplexity_result("phase1", 9000.0, untrained=True)
    row = row_of(perplexity_comparison(report), "phase1_htt16_ar32")
    assert (row["Perplexity"], row["Word perplexity"], row["Within 5 %"]) == ("UNTRAINED", None, "INCONCLUSIVE")
    assert row_of(configuration_comparison({"perplexity": report}), "phase1")["Perplexity"] == "UNTRAINED"


def test_different_protocols_are_pointed_out():
    report = perplexity_report()
    report.results["baseline"] = perplexity_result("baseline", 30.0, protocol_hash="other")
    assert any("not comparable" in note for note in perplexity_comparison(report).notes)


def test_results_of_one_configuration_share_a_row():
    row = row_of(configuration_comparison(all_reports()), "phase1")
    assert row["Peak allocated (GB)"] == 2.31
    assert (row["At T (tokens)"], row["Scaling"]) == (4096, "linear")
    assert (row["Perplexity"], row["Degradation (%)"], row["Within 5 %"]) == (37.06, 6.2, "FAIL")
    assert len(configuration_comparison(all_reports()).rows) == 3


def test_results_of_another_configuration_have_a_row_of_their_own():
    reports = all_reports()
    engine = reports["perplexity"].results.pop("phase1_htt16_ar32")
    reports["perplexity"].results["phase1_htt16_ar32"] = other_configuration(engine)
    rows = [row for row in records(configuration_comparison(reports)) if row["Model"] == "phase1"]
    assert [(row["Config id"], row["Peak allocated (GB)"], row["Perplexity"]) for row in rows] == [
        ("id-phase1", 2.31, None),
        ("other", None, 37.06),
    ]


def trained_without_recomputation(reports):
    """`reports` of real configurations, the engine's perplexity that of a model trained without recomputation."""
    config = ModelConfig()
    for report in reports.values():
        key = next(key for key in report.results if key.startswith("phase1"))
        mine = replace(config, recompute="none" if report.kind == "perplexity" else "block")
        update = {"config": asdict(mine), "config_id": mine.config_id}
        report.results[key] = report.results[key].model_copy(update=update)
    return reports


@pytest.mark.parametrize("kinds", [("memory", "throughput", "perplexity"), ("perplexity", "memory", "throughput")], ids=str)
def test_a_perplexity_belongs_to_its_model_with_or_without_recomputation(kinds):
    reports = trained_without_recomputation(all_reports())
    row = row_of(configuration_comparison({kind: reports[kind] for kind in kinds}), "phase1")
    assert (row["Config id"], row["Peak allocated (GB)"], row["Perplexity"]) == (ModelConfig().config_id, 2.31, 37.06)


def test_a_peak_belongs_to_one_way_of_training_alone_and_a_perplexity_to_its_own_first():
    reports = trained_without_recomputation(all_reports())
    engine = reports["perplexity"].results["phase1_htt16_ar32"]
    reports["throughput"].results["phase1"] = reports["throughput"].results["phase1"].model_copy(
        update={"config": engine.config, "config_id": engine.config_id}
    )
    rows = [row for row in records(configuration_comparison(reports)) if row["Model"] == "phase1"]
    found = [(row["Config id"], row["Peak allocated (GB)"], row["At T (tokens)"], row["Perplexity"]) for row in rows]
    assert found == [(ModelConfig().config_id, 2.31, None, None), (engine.config_id, None, 4096, 37.06)]


def test_a_perplexity_of_a_model_that_differs_in_more_has_a_row_of_its_own():
    reports = trained_without_recomputation(all_reports())
    mine = ModelConfig(recompute="none", htt_rank=8)
    engine = reports["perplexity"].results["phase1_htt16_ar32"]
    reports["perplexity"].results["phase1_htt16_ar32"] = engine.model_copy(
        update={"config": asdict(mine), "config_id": mine.config_id}
    )
    rows = [row for row in records(configuration_comparison(reports)) if row["Model"] == "phase1"]
    assert [row["Perplexity"] for row in rows] == [None, 37.06]


def test_results_against_another_baseline_have_a_row_of_their_own():
    reports = all_reports()
    reports["perplexity"].results["baseline"] = other_configuration(reports["perplexity"].results["baseline"])
    rows = [row for row in records(configuration_comparison(reports)) if row["Model"] == "phase1"]
    assert [(row["Baseline id"], row["Reduction (%)"], row["Degradation (%)"]) for row in rows] == [
        ("id-baseline", 75.05, None),
        ("other", None, 6.2),
    ]


def test_a_result_without_a_baseline_joins_the_row_of_its_configuration():
    reports = all_reports()
    del reports["throughput"].results["baseline"]
    row = row_of(configuration_comparison(reports), "phase1")
    assert (row["At T (tokens)"], row["Ratio to baseline (x)"], row["Perplexity"]) == (4096, None, 37.06)
    assert row_of(configuration_comparison(reports), "baseline")["Throughput (tokens/s)"] is None


def test_a_result_without_a_baseline_stays_alone_where_two_rows_claim_it():
    reports = all_reports()
    del reports["throughput"].results["baseline"]
    reports["perplexity"].results["baseline"] = other_configuration(reports["perplexity"].results["baseline"])
    rows = [row for row in records(configuration_comparison(reports)) if row["Model"] == "phase1"]
    assert [row["At T (tokens)"] for row in rows] == [None, None, 4096]


def test_two_rank_pairs_of_one_report_never_share_a_row():
    reports = all_reports()
    reports["perplexity"].results["phase1_htt8_ar16"] = perplexity_result("phase1", 40.0)  # the same id, by a fault
    rows = [row for row in records(configuration_comparison(reports)) if row["Model"] == "phase1"]
    assert [row["Perplexity"] for row in rows] == [37.06, 40.0]


def refusal(reports):
    with pytest.raises(ValueError) as error:
        build_tables(reports)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("change", [{"loss": "materialized"}, {"mixer": "attention"}, {"recompute": "none"}], ids=str)
def test_one_id_for_two_models_is_refused(change):
    reports = all_reports()
    changed = memory_result("phase1", 2_310_000_000).model_copy(update={"config": MODELS["phase1"] | change})
    reports["memory"].results["phase1"] = changed
    message = refusal(reports)
    assert "id-phase1" in message and next(iter(change)) in message


def test_one_id_with_two_parameter_counts_is_refused():
    reports = all_reports()
    reports["memory"].results["phase1"] = memory_result("phase1", 1, parameters=PARAMETERS["baseline"])
    assert "parameters" in refusal(reports)


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "n_layers"])
def test_a_report_that_compares_models_of_different_sizes_is_refused(name):
    reports = all_reports()
    config = MODELS["phase1"] | {name: 3}
    reports["memory"].results["phase1"] = memory_result("phase1", 1, config=config, config_id="small")
    assert "different sizes" in refusal(reports) and name in refusal(reports)


def test_hardware_comes_from_the_records_and_a_given_name_stands_before_it():
    for table in build_tables(all_reports()):
        assert table.hardware == "NVIDIA Test 10GB, 10.0 GB"
        assert table.hardware in table.caption
    for table in build_tables(all_reports(), "My card"):
        assert table.hardware in ("My card", "My card, recorded on NVIDIA Test 10GB, 10.0 GB")
        assert "My card, recorded on NVIDIA Test 10GB" in table.caption


def test_different_hardware_of_the_reports_is_named_apart():
    reports = all_reports()
    reports["throughput"] = throughput_report(environment={"device": "cpu", "gpu": None, "cpu": "Test CPU", "cpu_cores": 2})
    table = configuration_comparison(reports)
    assert "throughput: Test CPU (CPU, 2 cores)" in table.hardware and "memory: NVIDIA" in table.hardware


def test_hardware_that_the_record_does_not_name_is_unknown():
    assert "unknown processor" in memory_comparison(memory_report(environment={})).caption


def test_tables_need_only_the_reports_they_are_made_of():
    names = [t.name for t in build_tables({"memory": memory_report()})]
    assert names == ["memory_comparison", "memory_breakdown", "configuration_comparison"]
    names = [t.name for t in build_tables({"throughput": throughput_report()})]
    assert names == ["throughput_comparison", "scaling_comparison", "configuration_comparison"]
    assert build_tables({}) == []


def test_every_check_stands_in_the_notes_with_its_verdict():
    tables = [t for t in build_tables(all_reports()) if t.name not in ("memory_breakdown", "configuration_comparison")]
    assert len(tables) == 4
    for table in tables:
        assert any(note.startswith(("PASS", "FAIL")) for note in table.printed_notes)
    notes = memory_comparison(memory_report()).printed_notes
    assert "PASS fits_8gb: value 2,810,000,000, limit 7,200,000,000; measured: reserved bytes" in notes


def test_a_report_without_a_fit_or_measurements_still_makes_its_tables():
    report = throughput_report()
    engine = ThroughputResult(**common("phase1"), measurements=[measurement(512, 0.1)], scaling=None)
    report.results["phase1"] = engine
    assert row_of(scaling_comparison(report), "phase1")["Verdict"] == "inconclusive"
    assert row_of(configuration_comparison({"throughput": report}), "phase1")["At T (tokens)"] == 512
    assert throughput_result("phase1", [1.0, 2.0], (512, 1024)).scaling.verdict == "inconclusive"


def test_the_pareto_column_marks_what_nothing_else_beats():
    def model(size, perplexity, **changes):
        parameters = PARAMETERS["phase1"].model_copy(update={"embedding": size})
        return perplexity_result("phase1", perplexity).model_copy(update={"parameters": parameters} | changes)

    points = {
        "baseline": model(100, 20.0), "small": model(10, 21.0), "worse": model(11, 21.0), "equal": model(10, 21.0),
        "small_seed1": model(12, 30.0), "guess": model(1, 1.0, untrained=True),
    }  # fmt: skip
    assert pareto_front(points) == {"baseline": "yes", "small": "yes", "worse": "no", "equal": "yes", "small_seed1": "yes"}


def test_the_breakdown_adds_up_to_what_the_card_must_hold():
    changes = {"unattributed_bytes": 0, "fragmentation_bytes": 100_000_000, "top_modules": {"blocks.0.mlp": 2 * 10**8}}
    results = {key: result.model_copy(update=changes) for key, result in memory_report().results.items()}
    _, table = memory_tables(memory_report(results=results))
    column = [row[-1] for row in table.rows]
    names = [row[0] for row in table.rows]
    peak = names.index("= peak allocated")
    assert sum(column[:peak]) == pytest.approx(column[peak]) == pytest.approx(2.31)
    assert sum(column[peak:]) == pytest.approx(2.81)
    assert "phase1, largest modules at the peak: blocks.0.mlp 0.20 GB" in table.notes


@pytest.mark.parametrize("rest, warned", [(20_000_000, False), (30_000_000, True), (-30_000_000, True), (None, False)])
def test_a_breakdown_that_leaves_more_than_a_hundredth_of_the_peak_is_warned_of(rest, warned):
    results = {"phase1": memory_result("phase1", 2_310_000_000, unattributed_bytes=rest)}
    notes = memory_comparison(memory_report(results=results)).notes
    assert any(note.startswith("Warning: phase1: ") and "1.3 %" in note for note in notes) == warned


def test_an_estimate_says_once_what_it_assumes():
    results = {key: r.model_copy(update={"assumptions": "a card"}) for key, r in memory_report().results.items()}
    assert memory_comparison(memory_report(results=results)).notes.count("Estimated for a card.") == 1


def test_the_ablation_has_every_change_in_bytes_and_percent():
    rows = [
        Ablation(name="with the engine's loss", from_role="baseline", peak_allocated_bytes=4_630_000_000, change_bytes=-4_630_000_000),
        Ablation(name="without the engine's loss", from_role="phase1", detail="out of memory"),
    ]
    table = memory_tables(memory_report(ablation=rows))[-1]
    assert [row[3:5] for row in table.rows] == [(-4.63, pytest.approx(-50)), (None, None)]
    assert table.rows[1][-1] == "out of memory" and table.name == "memory_ablation"
