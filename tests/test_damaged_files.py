"""Results that survive: files damaged in any way are read as valid ones or refused at once, in one line."""

import copy
import itertools
import json
import random
import time

import pytest

from phase1.checkpoint import INDEX, load_model, resume, save_checkpoint
from phase1.record import FILES, read_report
from phase1.train import train_step
from tests.damage import at, cut, damaged, flipped, places, real_reports, renamed, replaced, spliced
from tests.reports import all_reports, assert_one_line, contents, make_tables, write_all
from tests.test_train import as_tensors, batch_at, state

CASES = 5400  # damaged result files
SECONDS = 1.0  # of processor time that a refusal may take


def test_a_result_file_damaged_in_any_way_is_read_as_a_valid_one_or_refused_at_once_in_one_line(tmp_path):
    rng, reports, path = random.Random(3), real_reports(), tmp_path / "a.json"
    assert all(len(json.dumps(content)) > 1000 for _, _, content in reports)
    refused = dict.fromkeys(["replaced", "renamed", "cut", "flipped", "spliced", "foreign"], 0)
    for case in itertools.count():
        if case == CASES:
            break
        how, data, kind = damaged(rng, reports)
        path.write_bytes(data)
        start = time.process_time()
        try:
            report = read_report(path, kind)
        except ValueError as error:
            refused[how] += 1
            message = str(error)
            assert message.isprintable() and message.startswith(f"{path}: expected ") and len(message) < 1000, (
                case,
                how,
                message,
            )
        else:
            assert report.kind == kind
            json.dumps(report.model_dump(), allow_nan=False)
        assert time.process_time() - start < SECONDS, (case, how)
    assert all(count > CASES / 100 for count in refused.values()), refused
    assert sum(refused.values()) < CASES  # and some damage is only another valid report


@pytest.mark.parametrize("how", ["no JSON", "wrong types"])
def test_tables_of_a_damaged_file_exit_2_with_one_line_and_leave_the_old_ones(tmp_path, capsys, how):
    results = write_all(tmp_path / "in")
    rng, out = random.Random(how), results.parent / "out"
    assert make_tables(results) == 0
    before = contents(out)
    capsys.readouterr()
    refused = 0
    for case in range(60):
        kind, report = rng.choice(list(all_reports().items()))
        content = json.loads(report.model_dump_json())
        good = (results / FILES[kind]).read_bytes()
        bad = cut(rng, good)[:-2] if how == "no JSON" else replaced(rng, content)
        (results / FILES[kind]).write_bytes(bad)
        code = make_tables(results)
        printed = capsys.readouterr()
        if code == 0:  # damage that makes another valid report
            assert how != "no JSON" and read_report(results / FILES[kind], kind)
            (results / FILES[kind]).write_bytes(good)
            assert make_tables(results) == 0
            capsys.readouterr()
        else:
            refused += 1
            assert code == 2, case
            assert_one_line(printed.err)
            (results / FILES[kind]).write_bytes(good)
        assert contents(out) == before
    assert refused >= 30


@pytest.mark.parametrize("number", [10**30, 10**307, 10**400, 10**4200], ids=lambda n: f"{len(str(n)) - 1} digits")
def test_numbers_that_no_measurement_has_end_in_tables_or_in_one_line(tmp_path, capsys, number):
    results = write_all(tmp_path / "in")
    for kind, report in all_reports().items():
        content, path = json.loads(report.model_dump_json()), results / FILES[kind]
        good = path.read_bytes()
        for place in places(content):
            if type(at(content, place)) is not int:
                continue
            changed = copy.deepcopy(content)
            at(changed, place[:-1])[place[-1]] = number
            path.write_text(json.dumps(changed))
            code = make_tables(results, "--formats", "csv")
            printed = capsys.readouterr()
            assert code in (0, 2), place
            assert code == 0 or not assert_one_line(printed.err)
        path.write_bytes(good)


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    rng, saved = random.Random(4), state()
    train_step(saved, as_tensors(batch_at(0), 4))
    save_checkpoint(tmp_path, saved, {})
    again = state()
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        damages = [cut, flipped, spliced, lambda rng, data: b""]
        if path.name == INDEX:
            damages += [lambda rng, data: renamed(rng, json.loads(data))] * 2
        refused = 0
        for case, damage in enumerate(damages * 12):
            path.write_bytes(damage(rng, good))
            for read in (load_model, lambda folder: resume(folder, again)):
                try:
                    read(tmp_path)
                except ValueError as error:
                    refused += 1
                    assert str(error).isprintable(), (path.name, case)
        assert refused >= 24
        path.write_bytes(good)
    load_model(tmp_path)
    resume(tmp_path, state())
