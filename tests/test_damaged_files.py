"""Results that survive: files damaged in any way are read as valid ones or refused at once, in one line."""

import copy
import itertools
import json
import random
import time

import pytest
import torch
from safetensors.torch import load_file

from phase1.config import ModelConfig
from phase1.measure.perplexity.result import Text, evaluate_checkpoint
from phase1.model import LanguageModel
from phase1.records.journal import open_journal
from phase1.records.schema import FILES, MemoryResult, read_report
from phase1.runs import PerplexityRun
from phase1.training import checkpoint
from phase1.training.checkpoint import INDEX, load_model, read_index, resume, save_checkpoint, training_facts
from phase1.training.step import train_step
from tests.damage import at, cut, damaged, flipped, places, real_reports, renamed, replaced, spliced
from tests.reports import all_reports, assert_one_line, contents, make_tables, memory_result, write_all
from tests.training.test_step import as_tensors, batch_at, state

CASES = 5400  # damaged result files
INDEX_CASES = 200  # damaged indexes of checkpoints
JOURNAL_CASES = 600
SECONDS = 1.0  # of processor time that an answer may take


def at_once(read):
    """What read() returns, or the ValueError it raises, within SECONDS; a busy machine is slow now and then, slow code each time."""
    for _ in range(3):
        start = time.process_time()
        try:
            answer = read()
        except ValueError as error:
            answer = error
        if time.process_time() - start < SECONDS:
            return answer
    raise AssertionError(f"expected an answer within {SECONDS} s of processor time, got none in three tries")


def test_a_result_file_damaged_in_any_way_is_read_as_a_valid_one_or_refused_at_once_in_one_line(tmp_path):
    rng, reports, path = random.Random(3), real_reports(), tmp_path / "a.json"
    assert all(len(json.dumps(content)) > 1000 for _, _, content in reports)
    refused = dict.fromkeys(["replaced", "renamed", "cut", "flipped", "spliced", "foreign"], 0)
    for case in itertools.count():
        if case == CASES:
            break
        how, data, kind = damaged(rng, reports)
        path.write_bytes(data)
        answer = at_once(lambda kind=kind: read_report(path, kind))
        if isinstance(answer, ValueError):
            refused[how] += 1
            message = str(answer)
            assert message.isprintable() and message.startswith(f"{path}: expected "), (case, how, message)
            assert len(message) < 1000, (case, how, message)
        else:
            assert answer.kind == kind
            json.dumps(answer.model_dump(), allow_nan=False)
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


SIZES = {
    "vocab_size": [51, 10**6, 10**9, 10**12, 10**15], "d_model": [8, 20, 2**30, 2**40], "n_layers": [0, 2, 10**6, 10**9, 10**15],
    "n_heads": [1, 4, 8], "ar_ssm_max_rank": [2, 6, 16], "ar_ssm_min_rank": [1, 4], "htt_rank": [2, 16], "htt_groups": [1, 40],
    "htt_dense_rows": [0, 10], "mixer": ["attention"], "embedding": ["dense"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_that_declares_other_sizes_than_its_tensors_have_is_refused_before_they_are_made(
    tmp_path, monkeypatch, name
):
    save_checkpoint(tmp_path, state(), {}, resumable=False)
    index, made, build = read_index(tmp_path), [], checkpoint.LanguageModel
    monkeypatch.setattr(checkpoint, "LanguageModel", lambda config: made.append(build(config)) or made[-1])
    for value in SIZES[name]:
        (tmp_path / INDEX).write_text(json.dumps(index | {"model_config": index["model_config"] | {name: value}}))
        answer = at_once(lambda: load_model(tmp_path))
        assert isinstance(answer, ValueError) and str(answer).isprintable(), (name, value)
    for model in made:
        taken = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
        assert taken == 0 or taken < checkpoint.SMALL


@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"n_layers": 1}, {"mixer": "attention", "embedding": "dense"}, {"d_model": 64, "n_heads": 2, "ar_ssm_max_rank": 64},
        {"htt_groups": 1}, {"htt_groups": 40_000, "htt_rank": 64}, {"d_model": 262, "n_heads": 1}, {"vocab_size": 2000, "htt_dense_rows": 0},
    ],
)  # fmt: skip
def test_what_is_called_a_small_model_has_no_more_elements_than_that(sizes, monkeypatch):
    config = ModelConfig(**({"n_layers": 2, "d_model": 64, "n_heads": 4} | sizes))
    with torch.device("meta"):
        elements = sum(tensor.numel() for tensor in LanguageModel(config).state_dict().values())
    monkeypatch.setattr(checkpoint, "SMALL", elements // 3)  # an HTT table has buffers besides, in proportion
    with checkpoint._no_memory(config):
        assert torch.empty(1).is_meta


def test_the_index_of_a_checkpoint_damaged_in_any_way_is_refused_in_one_line_or_fits_its_tensors(tmp_path):
    rng = random.Random(5)
    save_checkpoint(tmp_path, state(), {"finished": True}, resumable=False)
    good = (tmp_path / INDEX).read_bytes()
    content, refused = json.loads(good), 0
    reports = [("memory", good, content)]
    for case in range(INDEX_CASES):
        how, data, _ = damaged(rng, reports)
        (tmp_path / INDEX).write_bytes(data)
        answer = at_once(lambda: load_model(tmp_path))
        if isinstance(answer, ValueError):
            refused += 1
            assert str(answer).isprintable() and len(str(answer)) < 1000, (case, how)
        else:
            assert answer[0].state_dict().keys() == load_file(tmp_path / content["files"]["model"]).keys()
    assert INDEX_CASES / 2 < refused < INDEX_CASES


def test_a_journal_damaged_in_any_way_is_used_as_a_valid_one_or_refused_at_once_in_one_line(tmp_path):
    rng, report = random.Random(6), tmp_path / "a.json"
    machine, settings = {"cpu": "x", "threads": 2}, {"batch_size": 4, "seq_lengths": [1, 2]}
    results = {"baseline": memory_result("baseline", 1), "phase1": memory_result("phase1", 2)}
    journal = open_journal(report, settings, machine=machine, resume=True, data={"train": "ab"})
    for case, result in results.items():
        journal.case(case, MemoryResult, lambda result=result: result)
    good, refused = journal.path.read_bytes(), 0
    reports = [("memory", good, json.loads(good))]

    def used(data):
        journal.path.write_bytes(data)
        again = open_journal(report, settings, machine=machine, resume=True, data={"train": "ab"})
        return [again.case(case, MemoryResult, lambda result=result: result) for case, result in results.items()]

    for number in range(JOURNAL_CASES):
        how, data, _ = damaged(rng, reports)
        answer = at_once(lambda data=data: used(data))
        if isinstance(answer, ValueError):
            refused += 1
            message = str(answer)
            assert message.isprintable() and "leave out --resume" in message and len(message) < 1000, (number, how)
        else:
            assert all(isinstance(result, MemoryResult) for result in answer), (number, how)
    assert JOURNAL_CASES / 2 < refused < JOURNAL_CASES


FACTS = {
    "data": {"name": "a", "split": "train", "sha256": "0"}, "tokenizer": "0", "seq_length": 8, "trained_tokens": 64,
    "train_seconds": 1.5, "loss": 2.5, "finished": True,
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_a_checkpoint_with_damaged_facts_is_refused_in_one_line(tmp_path, name):
    assert training_facts(tmp_path, FACTS) == FACTS
    for wrong in (None, "\x1b[2J" if name != "tokenizer" else 3, [], {}, {"name": 1, "split": "x", "sha256": "x"}):
        save_checkpoint(tmp_path, state(), FACTS | {name: wrong}, resumable=False)
        with pytest.raises(ValueError, match=f"{INDEX} must say .* no such value for {name}") as error:
            evaluate_checkpoint(PerplexityRun(), "baseline", tmp_path, Text(None, None))
        assert str(error.value).isprintable()
    save_checkpoint(tmp_path, state(), FACTS | {"skipped_steps": "many"}, resumable=False)
    with pytest.raises(ValueError, match="no such value for skipped_steps"):
        evaluate_checkpoint(PerplexityRun(), "baseline", tmp_path, Text(None, None))
    save_checkpoint(tmp_path, state(), {key: value for key, value in FACTS.items() if key != name}, resumable=False)
    with pytest.raises(ValueError, match=f"value for {name}; train again"):
        evaluate_checkpoint(PerplexityRun(), "baseline", tmp_path, Text(None, None))
