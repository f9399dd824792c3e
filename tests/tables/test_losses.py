import pytest

from phase1.plots import plot_losses
from phase1.records.schema import LossPart
from phase1.tables import build_tables, loss_comparison
from phase1.tables.console import perplexity_text
from tests.reports import perplexity_report, perplexity_result


def result(key, order="o", **changes):
    losses = {
        "loss_by_position": [part(0, 0, 2, 6.0), part(1, 1, 2, 5.0)],
        "loss_by_band": [part(0, 1023, 3, 2.5), part(1024, 4095, 1, 7.0)],
        "token_order_sha256": order,
    }
    return perplexity_result(key, 30.0).model_copy(update=losses | changes)


def part(first, last, tokens, loss):
    return LossPart(first=first, last=last, tokens=tokens, avg_loss=loss)


def report(**engine):
    results = {"baseline": result("baseline"), "phase1_htt16_ar32": result("phase1", **engine)}
    return perplexity_report(results=results, checks=[])


def rows(made):
    return list(loss_comparison(made).rows)


def test_every_group_of_targets_is_a_row_and_every_model_a_column():
    assert rows(report(loss_by_band=[part(0, 1023, 3, 2.0), part(1024, 4095, 1, 8.0)])) == [
        ("tokens of context", 0, 0, 2, 6.0, 6.0),
        ("tokens of context", 1, 1, 2, 5.0, 5.0),
        ("frequency rank", 0, 1023, 3, 2.5, 2.0),
        ("frequency rank", 1024, 4095, 1, 7.0, 8.0),
    ]


def test_ranks_of_another_order_are_left_out_with_the_reason():
    table = loss_comparison(report(order="p"))
    assert [row[5] for row in table.rows] == [6.0, 5.0, None, None]
    assert any("phase1_htt16_ar32: no losses by rank, trained on other tokens" in note for note in table.notes)


def test_a_model_without_an_order_says_why():
    table = loss_comparison(report(loss_by_band=None, token_order_sha256=None, loss_by_band_detail="no order; train again"))
    assert [row[5] for row in table.rows] == [6.0, 5.0, None, None]
    assert any("no losses by rank, no order; train again" in note for note in table.notes)


def test_other_targets_are_not_put_beside_these():
    table = loss_comparison(report(protocol_hash="other"))
    assert [column.title for column in table.columns] == ["By", "From", "To", "Tokens", "baseline"]
    assert any("phase1_htt16_ar32: other targets" in note for note in table.notes)


def test_an_untrained_model_has_no_column():
    titles = [column.title for column in loss_comparison(report(untrained=True)).columns]
    assert titles[4:] == ["baseline"]


def test_reports_without_losses_have_no_such_table():
    assert "loss_comparison" not in [table.name for table in build_tables({"perplexity": perplexity_report()})]
    assert "loss_comparison" in [table.name for table in build_tables({"perplexity": report()})]
    assert "frequency rank" not in perplexity_text(perplexity_report()) and "frequency rank" in perplexity_text(report())


@pytest.fixture
def lines(drawn, tmp_path):
    """Names and values of the lines in the plot of a report: by context, by frequency."""

    def lines_of(report):
        assert plot_losses(report, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        return [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in drawn[-1].axes]

    return lines_of


def test_the_plot_shows_the_models_of_the_table_less_the_baseline(lines):
    better = {"loss_by_position": [part(0, 0, 2, 5.5), part(1, 1, 2, 5.25)]}
    context, frequency = lines(report(order="p", **better))
    assert context == {"baseline": [0.0, 0.0], "phase1_htt16_ar32": [-0.5, 0.25]}
    assert frequency == {"baseline": [0.0, 0.0]}


def test_the_plot_of_one_model_shows_its_losses(lines):
    context, frequency = lines(perplexity_report(results={"phase1_htt16_ar32": result("phase1")}, checks=[]))
    assert context == {"phase1_htt16_ar32": [6.0, 5.0]} and frequency == {"phase1_htt16_ar32": [2.5, 7.0]}


def test_the_plot_takes_the_baseline_of_the_same_seed(lines):
    lower = [part(0, 0, 2, 4.0), part(1, 1, 2, 3.0)]
    results = {"baseline": result("baseline"), "baseline_seed1": result("baseline", loss_by_position=lower)}
    results |= {"no_gate_seed1": result("phase1")}
    context, _ = lines(perplexity_report(results=results, checks=[]))
    assert context["no_gate_seed1"] == [2.0, 2.0] and set(context) == {"baseline", "_", "no_gate_seed1"}
