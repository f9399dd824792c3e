import os
import subprocess
import sys
from pathlib import Path

import pytest

from phase1.record import MemoryResult, Parameters, ThroughputResult
from phase1.report import plot_memory, plot_perplexity, plot_throughput
from tests.reports import failed, memory_report, memory_result, perplexity_report, perplexity_result, throughput_report

PLOTS = {"memory": (plot_memory, memory_report), "throughput": (plot_throughput, throughput_report)}
PLOTS |= {"perplexity": (plot_perplexity, perplexity_report)}


def size_of(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at what is in them."""
    from phase1.report import plots

    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


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


def test_a_model_that_ran_out_of_memory_is_marked_in_the_memory_plot(tmp_path, drawn):
    report = memory_report()
    report.results["baseline"] = MemoryResult(**failed("baseline"))
    report.results["phase1"] = memory_result("phase1", 2_000_000_000, breakdown={"unattributed": -5, "activations": 2 * 10**9})
    plot_memory(report, tmp_path / "plot.png")
    assert "OOM" in words(drawn[0])


def test_perplexity_shows_only_models_that_can_be_compared(tmp_path, drawn):
    report = perplexity_report()
    report.results["phase1_htt8_ar32"] = perplexity_result("phase1", 9000.0, untrained=True)
    small = Parameters(total=1, embedding=1, mixer=0, mlp=0)
    report.results["phase1_htt4_ar32"] = perplexity_result("phase1", 33.0, ppl_degradation_percent=-5.0, parameters=small)
    plot_perplexity(report, tmp_path / "plot.png")
    text = words(drawn[0])
    assert "htt16" in text and "htt4" in text and "htt8" not in text and "limit: 5 %" in text


def test_a_report_of_failures_still_makes_a_plot(tmp_path):
    for kind, result in (("memory", MemoryResult), ("throughput", ThroughputResult)):
        plot, make = PLOTS[kind]
        assert size_of(plot(make(results={"phase1": result(**failed("phase1"))}), tmp_path / f"{kind}.png"))


def test_a_dollar_in_a_name_is_no_formula(tmp_path, drawn):
    plot_throughput(throughput_report(environment={"gpu": r"$\frac{$ card"}), tmp_path / "plot.png")
    assert "card" in words(drawn[0])


def test_plotting_leaves_no_state_and_loads_no_window_system():
    code = (
        "import sys; from tests.reports import memory_report; from phase1.report import plot_memory; import tempfile, os;"
        "assert 'matplotlib' not in sys.modules;"
        "plot_memory(memory_report(), os.path.join(tempfile.mkdtemp(), 'a.png')); print('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "False"
