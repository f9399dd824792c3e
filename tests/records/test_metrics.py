import json

import pytest

from phase1.records.metrics import FIELDS, MetricsLog, read_course, read_metrics, require_undamaged


def row(step, **values):
    return dict.fromkeys(FIELDS) | {"step": step, "loss": 1.5, "session": 1} | values


def steps(path):
    return [r["step"] for r in read_metrics(path)]


def write(path, *numbers, step=0):
    log = MetricsLog(path, step)
    for number in numbers:
        log.append(row(number))
    log.keep()
    log.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 5, 9)
    write(path, 6, 7, step=5)  # the checkpoint was that of step 5
    assert steps(path) == [1, 2, 5, 6, 7]
    write(path, 1)
    assert steps(path) == [1]


def test_every_row_says_in_which_session_it_was_made(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, numbers in ((0, (1, 2, 3)), (2, (3, 4)), (4, (5,))):
        log = MetricsLog(path, step)
        for number in numbers:
            log.append(row(number, session=log.session))
        log.close()
    assert [(r["step"], r["session"]) for r in read_metrics(path)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]


def test_a_file_of_an_earlier_version_is_read_as_one_session(tmp_path):
    path = tmp_path / "metrics.jsonl"
    older = {name: value for name, value in row(1).items() if name not in ("session", "unigram_loss")}
    path.write_text(json.dumps(older) + "\n")
    assert read_metrics(path) == [row(1, session=1)] and MetricsLog(path, 1).session == 2


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_line_is_taken_away(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(path) == [1, 2]
    write(path, 4, step=3)
    assert steps(path) == [1, 2, 4] and path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("length", [1, 5, 9, 10, 30, None])
def test_a_file_whose_only_line_is_torn_begins_anew(tmp_path, length, end):
    path = tmp_path / "metrics.jsonl"
    write(path, 1)
    content = path.read_bytes()[:-1]
    path.write_bytes(content if length is None else content[:length] + end)
    assert steps(path) == []
    with pytest.raises(ValueError, match="no whole step yet; run the train command again"):
        read_course(path)
    write(path, 1, 2)
    assert steps(path) == [1, 2]


def test_a_number_that_is_none_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append(row(1, loss=float("nan"), grad_norm=float("inf")))
    log.close()
    assert b"NaN" not in path.read_bytes() and read_metrics(path)[0]["loss"] is None


@pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b'{"step": 1}\n', b"\xff\n", b"[" * 100_000 + b"\n", b"garbage", b"[1]"])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*expected a file that `phase1 train` wrote[^\n]*$"):
        MetricsLog(path, 0)
    assert path.read_bytes() == content


def test_a_damaged_line_ends_what_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + b"garbage\n" + path.read_bytes())
    assert steps(path) == [1, 2]
    with pytest.raises(ValueError, match=r"^[^\n]*line 3: expected .* later step; got another; whole lines after it are left out .2."):
        require_undamaged(path, read_metrics(path))


@pytest.mark.parametrize("end", [b"", b'{"step": 3, "lo', b"garbage\n", b"garbage\ngarbage\n"])
def test_an_end_that_is_torn_is_no_damage(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + end)
    require_undamaged(path, read_metrics(path))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
