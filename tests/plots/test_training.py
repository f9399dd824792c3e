from phase1.plots import plot_training


def rows(*steps, val=None):
    return [{"tokens": 10 * s, "loss": 9.0 - s, "val_loss": val} for s in steps]


def test_loss_and_validation_loss_are_drawn_over_tokens_with_the_unigram_entropy(tmp_path, drawn):
    path = plot_training({"a": rows(1, 2, val=8.5), "$b": rows(1, 3)}, tmp_path / "t.png", 6.5)
    (axes,) = drawn[0].axes
    assert path.stat().st_size > 1000
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}
    assert lines == {
        "a, training text": [[10, 8], [20, 7]], "a, valid text": [[10, 8.5], [20, 8.5]], r"\$b, training text": [[10, 8], [30, 6]],
    }  # fmt: skip
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [6.5]


def test_a_run_without_a_row_is_an_empty_plot(tmp_path):
    assert plot_training({"a": []}, tmp_path / "t.png").exists()
