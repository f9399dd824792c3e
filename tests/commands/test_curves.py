import json

import pytest

from phase1.cli import main
from phase1.records.metrics import FIELDS, METRICS, read_metrics
from tests.plots.test_training import dashed, lines
from tests.reports import assert_one_line
from tests.training.test_trackers import train


def training(folder, *losses):
    folder.mkdir(parents=True)
    rows = [
        dict.fromkeys(FIELDS) | {"session": 1, "step": i, "tokens": 32 * i, "loss": loss, "val_loss": loss + 1}
        for i, loss in enumerate(losses, 1)
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_trainings_of_several_folders_are_in_one_plot_under_names_that_tell_them_apart(tmp_path, drawn, capsys):
    a, b = training(tmp_path / "a" / "train", 5.0, 4.0), training(tmp_path / "b" / "train", 6.0)
    training(tmp_path / "more" / "x", 7.0)
    training(tmp_path / "more" / "y", 8.0)
    out = tmp_path / "deep" / "curves.svg"
    assert main(["curves", a, b, str(tmp_path / "more"), "--out", str(out)]) == 0
    drawn_lines = lines(drawn[0].axes[0])
    names = {label.removesuffix(", training text") for label in drawn_lines if label.endswith("training text")}
    assert names == {a, b, f"{tmp_path}/more/x", f"{tmp_path}/more/y"} and len(drawn) == 1
    assert drawn_lines[f"{a}, training text"] == [[32, 5], [64, 4]] and drawn_lines[f"{b}, valid text"] == [[32, 7]]
    assert "<svg" in out.read_text()
    said = capsys.readouterr().out
    assert "4 in one plot" in said and "64 tokens, valid loss 5.000, best 5.000" in said and "curves.svg" in said


@pytest.mark.parametrize("flags, says", [([], "metrics.jsonl"), (["--out", "curves.pdf"], ".png or .svg")])
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, flags, says):
    assert main(["curves", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert_one_line(err)
    assert says in err and not list(tmp_path.iterdir())


def test_a_training_that_went_on_shows_its_sessions_and_the_entropy_of_its_valid_text(tmp_path, drawn):
    assert train(tmp_path, "--max-hours", "1e-9") == 0  # one step
    assert train(tmp_path) == 0
    rows = read_metrics(tmp_path / "run" / METRICS)
    assert [row["session"] for row in rows] == [1, 2] and rows[0]["unigram_loss"] == rows[1]["unigram_loss"] > 1
    assert main(["curves", str(tmp_path / "run"), "--out", str(tmp_path / "c.png")]) == 0
    for figure in drawn:  # that of the training, and that of this command
        (axes,) = figure.axes
        assert dashed(axes) == [rows[0]["unigram_loss"]]
    assert lines(axes)[f"{tmp_path / 'run'}, resumed"] == [[rows[1]["tokens"], rows[1]["loss"]]]


@pytest.mark.parametrize("content, says", [("hello", "got another"), ('{"step": 1, "to', "no whole step yet; run the train command")])
def test_a_damaged_training_is_named_and_the_others_are_drawn(tmp_path, capsys, content, says):
    whole = training(tmp_path / "a", 5.0, 4.0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / METRICS).write_text(content)
    out = tmp_path / "c.png"
    assert main(["curves", whole, str(tmp_path / "b"), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert_one_line(err)
    assert err.startswith(f"phase1 curves: damaged: {tmp_path / 'b' / METRICS}: ") and says in err and out.exists()
    out.unlink()
    assert main(["curves", str(tmp_path / "b"), "--out", str(out)]) == 2 and not out.exists()


def test_a_damaged_line_is_named_and_what_stands_before_it_is_drawn(tmp_path, drawn, capsys):
    folder = training(tmp_path / "a", 5.0, 4.0, 3.0)
    path = tmp_path / "a" / METRICS
    path.write_text(path.read_text().replace('"loss": 4.0', '"loss": 4.0.0'))
    assert main(["curves", folder, "--out", str(tmp_path / "c.png")]) == 2
    err = capsys.readouterr().err
    assert "line 2" in err and "left out (1)" in err
    assert lines(drawn[0].axes[0])[f"{folder}, training text"] == [[32, 5]]
