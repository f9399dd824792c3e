import os
import subprocess
import sys
from pathlib import Path

import pytest

from phase1.plots import plot_memory, plot_memory_timeline, plot_perplexity, plot_throughput
from phase1.plots.perplexity import series_styles
from phase1.records.schema import Check, MemoryResult, MemoryTimeline, Parameters, ThroughputResult
from tests.reports import failed, memory_report, memory_result, perplexity_report, perplexity_result, throughput_report

PLOTS = {"memory": (plot_memory, memory_report), "throughput": (plot_throughput, throughput_report)}
PLOTS |= {"perplexity": (plot_perplexity, perplexity_report)}


def size_of(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def words(figure):
    """All text of a figure."""
    import matplotlib.text

    return " | ".join(found.get_text() for found in figure.findobj(matplotlib.text.Text) if found.get_text())


@pytest.mark.parametrize("kind", PLOTS)
def test_a_plot_is_a_picture_that_names_the_hardware_and_how_it_was_measured(tmp_path, drawn, kind):
    plot, make = PLOTS[kind]
    path = tmp_path / "plot.png"
    assert plot(make(), path) == path
    width, height = size_of(path)
    assert width >= 700 and height >= 400
    assert "NVIDIA Test 10GB" in words(drawn[0]) and "(measured)" in words(drawn[0])


@pytest.mark.parametrize("kind", PLOTS)
def test_the_same_report_gives_the_same_bytes(tmp_path, kind):
    plot, make = PLOTS[kind]
    assert plot(make(), tmp_path / "a.png").read_bytes() == plot(make(), tmp_path / "b.png").read_bytes()


def test_throughput_shows_every_model_the_guides_and_the_length_that_ran_out_of_memory(tmp_path, drawn):
    plot_throughput(throughput_report(), tmp_path / "plot.png")
    text = words(drawn[0])
    assert all(word in text for word in ("baseline", "phase1", "OOM", "proportional to T²", "step time (ms)"))
    speed, time = drawn[0].axes
    assert [list(line.get_xdata()) for line in speed.lines[:1]] == [[512, 1024, 2048]]
    assert time.get_xscale() == time.get_yscale() == "log"


def test_memory_bars_are_as_high_as_what_the_card_must_hold(tmp_path, drawn):
    plot_memory(memory_report(), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    tops = {}
    for bar in axes.patches:
        x = round(bar.get_x() + bar.get_width() / 2)
        tops[x] = max(tops.get(x, 0.0), bar.get_y() + bar.get_height())
    assert tops == pytest.approx({0: 9.76, 1: 3.9, 2: 2.81})
    assert "7.2 GB" in words(drawn[0]) and "9.0 GB" in words(drawn[0])


def test_names_below_the_bars_do_not_overlap(tmp_path, drawn):
    roles = ("baseline", "baseline_optimized", "baseline_fast", "phase1")
    plot_memory(memory_report(results={role: memory_result(role, 10**9) for role in roles}), tmp_path / "plot.png")
    boxes = [label.get_window_extent() for label in drawn[0].axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
    assert "baseline_\noptimized" in words(drawn[0])


def test_the_limits_drawn_are_those_of_the_checks(tmp_path, drawn):
    check = Check(name="fits_16gb", value=1.0, limit=14.4e9, status="pass")
    plot_memory(memory_report(checks=[check, check.model_copy(update={"name": "reduction", "limit": 50.0})]), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert [line.get_ydata()[0] for line in axes.lines] == [14.4]
    assert "14.4 GB: limit of the 16 GB card" in words(drawn[0]) and "7.2 GB" not in words(drawn[0])


def timeline(**changes):
    parts = {"parameters": [10**9] * 4, "activations": [0, 2 * 10**9, 10**9, 0], "rounding": [0] * 4}
    begins = {"forward": 0, "backward": 40, "optimizer": 80}
    return MemoryTimeline(**({"events": 100, "phase_begins": begins, "at": [0, 39, 60, 99], "parts": parts} | changes))


def test_the_timeline_has_a_panel_per_model_with_its_parts_stacked_and_its_phases_named(tmp_path, drawn):
    results = {key: result.model_copy(update={"timeline": timeline()}) for key, result in memory_report().results.items()}
    path = plot_memory_timeline(memory_report(results=results), tmp_path / "plot.png")
    assert size_of(path)[1] > 700 and len(drawn[0].axes) == 3
    assert all(word in words(drawn[0]) for word in ("forward", "backward", "optimizer", "activations", "phase1: peak 3.00 GB"))
    assert "rounding" not in words(drawn[0])  # nothing to see
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in drawn[0].axes[0].collections]
    assert tops == [1, 3]


def test_a_report_without_a_timeline_makes_an_empty_plot(tmp_path):
    assert size_of(plot_memory_timeline(memory_report(), tmp_path / "plot.png"))


def test_a_model_that_ran_out_of_memory_is_marked_in_the_memory_plot(tmp_path, drawn):
    report = memory_report()
    report.results["baseline"] = MemoryResult(**failed("baseline"))
    report.results["phase1"] = memory_result("phase1", 2_000_000_000, breakdown={"unattributed": -5, "activations": 2 * 10**9})
    plot_memory(report, tmp_path / "plot.png")
    assert "OOM" in words(drawn[0])


def engine(htt, change, **changes):
    size = Parameters(total=1, embedding=htt * 100_000, mixer=0, mlp=0)
    interval = (change - 1, change + 1)
    numbers = {"parameters": size, "ppl_degradation_percent": change, "degradation_ci95": interval}
    return perplexity_result("phase1", 33.0 + change, **(numbers | changes))


def test_perplexity_shows_only_models_that_can_be_compared(tmp_path, drawn):
    report = perplexity_report()
    report.results["phase1_htt8_ar32"] = perplexity_result("phase1", 9000.0, untrained=True)
    report.results["phase1_htt4_ar32"] = engine(4, -5.0)
    plot_perplexity(report, tmp_path / "plot.png")
    text = words(drawn[0])
    assert "HTT 16" in text and "HTT 4" in text and "HTT 8" not in text and "limit: 5 %" in text
    assert "baseline: 34.90" in text and "phase1, AR-SSM rank 32" in text


def test_a_single_engine_is_named_with_its_perplexity_of_every_seed(tmp_path, drawn):
    report = perplexity_report()
    report.results["phase1_htt16_ar32_seed1"] = engine(16, 4.0)
    plot_perplexity(report, tmp_path / "plot.png")
    assert "phase1_htt16_ar32: 37.06, 37.00" in words(drawn[0])


def test_a_grid_of_ranks_is_a_series_per_ar_ssm_rank_joined_by_seed_at_the_sizes_of_the_tables(tmp_path, drawn):
    grid = {(htt, ar): htt / 10 - ar / 100 for htt in (8, 16, 32) for ar in (16, 64)}
    results = {"baseline": perplexity_result("baseline", 34.9)}
    results |= {f"phase1_htt{htt}_ar{ar}": engine(htt, change) for (htt, ar), change in reversed(grid.items())}
    results |= {f"phase1_htt{htt}_ar16_seed1": engine(htt, 3.0) for htt in (8, 16)}
    results |= {"no_gate": engine(16, 1.0)}
    plot_perplexity(perplexity_report(results=results), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    (legend,) = drawn[0].legends
    entries = ["baseline: 34.90", "no_gate: 34.00", "phase1, AR-SSM rank 16", "phase1, AR-SSM rank 64"]
    assert [text.get_text() for text in legend.get_texts()] == entries
    joined = sorted(tuple(line.get_ydata()) for line in axes.lines if line.get_alpha() and len(line.get_xdata()) > 1)
    assert joined == sorted([tuple(grid[htt, 16] for htt in (8, 16, 32)), tuple(grid[htt, 64] for htt in (8, 16, 32)), (3.0, 3.0)])
    places = sorted(x for line in axes.lines if line.get_alpha() for x in line.get_xdata() if 1 < x < 2)
    assert len(places) == 4 and len(set(places)) == 3  # two seeds of rank 16 at one place, rank 64 and no_gate beside it
    assert all(abs(x / 1.6 - 1) < 0.1 for x in places) and min(places) * max(places) == pytest.approx(1.6**2)


def test_models_look_different_and_seeds_of_one_alike():
    names = ["baseline", *(f"phase1_htt{htt}_ar{ar}" for htt in (8, 16, 32) for ar in (16, 32, 64))]
    names += ["ar_ssm_dense", "attention_htt", "no_gate", "no_copy", "transformer_copy", "equal_parameters"]
    found = series_styles([*names, *(f"{name}_seed1" for name in names)])
    assert len({tuple(found[name].values()) for name in names}) == len(names)
    assert all(found[name] == found[f"{name}_seed1"] for name in names)


def test_a_report_of_failures_still_makes_a_plot(tmp_path):
    for kind, result in (("memory", MemoryResult), ("throughput", ThroughputResult)):
        plot, make = PLOTS[kind]
        assert size_of(plot(make(results={"phase1": result(**failed("phase1"))}), tmp_path / f"{kind}.png"))


def test_a_dollar_in_a_name_is_no_formula(tmp_path, drawn):
    plot_throughput(throughput_report(environment={"gpu": r"$\frac{$ card"}), tmp_path / "plot.png")
    assert "card" in words(drawn[0])


def test_plotting_leaves_no_state_and_loads_no_window_system():
    code = (
        "import sys; from tests.reports import memory_report; from phase1.plots import plot_memory; import tempfile, os;"
        "assert 'matplotlib' not in sys.modules;"
        "plot_memory(memory_report(), os.path.join(tempfile.mkdtemp(), 'a.png')); print('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    "environment, settings",
    [({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, ""), ({"MPLBACKEND": "no such"}, ""), ({}, "text.usetex: True\nfont.size: 40")],
    ids=["notebook", "no such backend", "matplotlibrc"],
)  # fmt: skip
def test_the_users_matplotlib_changes_no_plot(tmp_path, environment, settings):
    """A notebook names its backend to the programs that it starts, and it may be none of this environment's."""
    (tmp_path / "matplotlibrc").write_text(settings)
    code = (
        "import sys; from phase1.plots import plot_memory; from tests.reports import memory_report\n"
        "plot_memory(memory_report(), sys.argv[1]); import os; print(os.environ.get('MPLBACKEND'))"
    )
    root = Path(__file__).parents[2]
    paths = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "PATH": "", "MATPLOTLIBRC": str(tmp_path)}
    paths.pop("MPLBACKEND", None)
    command = [sys.executable, "-c", code, str(tmp_path / "theirs.png")]
    ran = subprocess.run(command, env=paths | environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(environment.get("MPLBACKEND"))  # as it was for everybody else
    assert (tmp_path / "theirs.png").read_bytes() == plot_memory(memory_report(), tmp_path / "ours.png").read_bytes()


def test_a_plot_leaves_the_settings_of_its_process_as_they_were(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 33}):
        plot_memory(memory_report(), tmp_path / "a.png")
        assert matplotlib.rcParams["font.size"] == 33
