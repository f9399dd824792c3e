import warnings

import pytest
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from phase1.plots import plot_training


def rows(*steps, val=None, sessions=None, unigram=None):
    numbers = sessions or [1] * len(steps)
    return [
        {"tokens": 10 * s, "loss": 9.0 - s, "val_loss": val, "session": n, "unigram_loss": unigram}
        for s, n in zip(steps, numbers, strict=True)
    ]


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}


def dashed(axes):
    return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]


def test_loss_and_validation_loss_are_drawn_over_tokens_with_the_unigram_entropy(tmp_path, drawn):
    path = plot_training({"a": rows(1, 2, val=8.5, unigram=6.5), "$b": rows(1, 3, unigram=6.5)}, tmp_path / "t.png")
    (axes,) = drawn[0].axes
    assert path.stat().st_size > 1000
    assert lines(axes) == {
        "a, training text": [[10, 8], [20, 7]], "a, valid text": [[10, 8.5], [20, 8.5]], r"\$b, training text": [[10, 8], [30, 6]],
    }  # fmt: skip
    assert dashed(axes) == [6.5]


def test_a_text_of_its_own_has_a_line_of_its_own_and_an_unknown_one_none(tmp_path, drawn):
    plot_training({"a": rows(1, unigram=6.5), "b": rows(1, unigram=7.0), "c": rows(1)}, tmp_path / "t.png")
    assert dashed(drawn[0].axes[0]) == [6.5, 7.0]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_first_loss_of_a_resumed_session_is_marked(tmp_path, drawn, suffix):
    unknown = rows(3, sessions=[2])[0] | {"loss": None}  # a loss that was no number has no place
    run = [*rows(1, 2, sessions=[1, 1]), unknown, *rows(4, 5, 6, sessions=[2, 2, 3])]
    assert plot_training({"a": run, "b": rows(1, 2)}, tmp_path / f"t{suffix}").exists()
    found = lines(drawn[0].axes[0])
    assert found["a, resumed"] == [[40, 5], [60, 3]] and "b, resumed" not in found


def test_a_run_without_a_row_is_an_empty_plot(tmp_path):
    assert plot_training({"a": []}, tmp_path / "t.png").exists()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_name_that_the_usual_font_has_not_is_drawn_in_one_that_has_it(tmp_path, drawn, capsys, suffix):
    """Without a word; ⌕ is in a font that comes with matplotlib."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_training({"⌕ a": rows(1, 2)}, tmp_path / f"t{suffix}")
    assert capsys.readouterr().err == ""
    if suffix == ".png":
        (label,) = drawn[0].axes[0].get_legend().get_texts()
        fonts = [get_font(findfont(FontProperties(family=[family]))) for family in label.get_fontfamily()]
        assert [ord("⌕") in font.get_charmap() for font in fonts] == [False, True]


def test_a_name_that_no_font_has_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name.startswith(("DejaVu Sans", "Last"))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_training({"日本 ⌕": rows(1, 2)}, tmp_path / "t.png")
    err = capsys.readouterr().err
    assert err == "t.png: no font here has 日本, drawn as boxes; install one that has, such as Noto Sans CJK\n"
