"""Results that survive: files damaged in any way are read as valid ones or refused at once, in one line."""

import copy
import itertools
import json
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save

from phase1.config import ModelConfig
from phase1.data.local import file_text, read_token_file, split_file
from phase1.errors import Diverged
from phase1.measure.perplexity.result import ScoredText, evaluate_checkpoint
from phase1.model import LanguageModel
from phase1.records.journal import open_journal
from phase1.records.schema import FILES, MemoryResult, read_report
from phase1.runs import PerplexityRun
from phase1.training import checkpoint
from phase1.training.checkpoint import INDEX, load_model, load_token_order, read_index, resume, save_checkpoint, training_facts
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
def test_tables_of_a_damaged_file_exit_2_with_one_line_and_leave_its_old_ones(tmp_path, capsys, how):
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
            whole = {name: data for name, data in before.items() if not name.startswith("configuration_")}  # of all files
            assert whole.items() <= contents(out).items()
            (results / FILES[kind]).write_bytes(good)
            assert make_tables(results) == 0
            capsys.readouterr()
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
    index, made, build = read_index(tmp_path), [], checkpoint.build
    monkeypatch.setattr(checkpoint, "build", lambda config: made.append(build(config)) or made[-1])
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
    "data": {"name": "a", "split": "train", "sha256": "0"}, "tokenizer": "0", "seq_length": 8, "trained_tokens": 0,
    "train_seconds": 1.5, "loss": 2.5, "finished": False,
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_a_checkpoint_with_damaged_facts_is_refused_in_one_line(tmp_path, name):
    save_checkpoint(tmp_path, state(), FACTS, resumable=False)
    assert training_facts(tmp_path, read_index(tmp_path)) == FACTS
    for wrong in (None, "\x1b[2J" if name != "tokenizer" else 3, [], {}, {"name": 1, "split": "x", "sha256": "x"}):
        save_checkpoint(tmp_path, state(), FACTS | {name: wrong}, resumable=False)
        with pytest.raises(ValueError, match=f"{INDEX} must say .* no such value for {name}") as error:
            evaluate_checkpoint(PerplexityRun(), "baseline", tmp_path, ScoredText(None, None))
        assert str(error.value).isprintable()
    save_checkpoint(tmp_path, state(), FACTS | {"skipped_steps": "many"}, resumable=False)
    with pytest.raises(ValueError, match="no such value for skipped_steps"):
        evaluate_checkpoint(PerplexityRun(), "baseline", tmp_path, ScoredText(None, None))
    save_checkpoint(tmp_path, state(), {key: value for key, value in FACTS.items() if key != name}, resumable=False)
    with pytest.raises(ValueError, match=f"value for {name}; train again"):
        evaluate_checkpoint(PerplexityRun(), "baseline", tmp_path, ScoredText(None, None))


@pytest.fixture
def three_steps(tmp_path):
    """A checkpoint of 3 steps of 40, as a training leaves it."""
    saved = state()
    for step in range(3):
        train_step(saved, as_tensors(batch_at(step), 4))
    save_checkpoint(tmp_path, saved, FACTS | {"trained_tokens": 3 * 4 * 8})
    assert training_facts(tmp_path, read_index(tmp_path)) and resume(tmp_path, state())
    return tmp_path


def refused(folder, part, content, read):
    """Write `content` over an entry of the index, which `read` must refuse in one line."""
    index = json.loads((folder / INDEX).read_text())
    at(index, part[:-1])[part[-1]] = content
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        read(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "part, content",
    [
        (("step",), -1), (("step",), 2), (("step",), 39), (("step",), 40), (("step",), 10**9), (("step",), 10**30), (("step",), 3.0),
        (("step",), True), (("scaler",), {"scale": 1.0}), (("scaler",), {"junk": 1}), (("model_config", "mixer"), 1),
        (("model_config", "mixer"), ["attention"]), (("model_config", "embedding"), None), (("model_config", "embedding"), {}),
        (("model_config", "d_model"), 16.0), (("model_config", "copy_head"), 1), (("model_config", "d_model"), "16"),
        (("train_config", "train_batch_size"), 0), (("train_config", "learning_rate"), "fast"), (("train_config", "seed"), [0]),
        (("train_config", "precision"), "fp8"), (("files", "model"), "model-00000004.safetensors"),
    ],
    ids=str,
)  # fmt: skip
def test_no_entry_of_an_index_is_believed(three_steps, part, content):
    refused(three_steps, part, content, lambda folder: resume(folder, state()))


@pytest.mark.parametrize(
    "fact, value",
    [("trained_tokens", 64_000_000_000), ("trained_tokens", 95), ("finished", True), ("seq_length", 16), ("seq_length", 0),
     ("train_seconds", -1), ("seq_length", 10**9)],
)  # fmt: skip
def test_facts_that_contradict_step_and_schedule_are_refused(three_steps, fact, value):
    refused(three_steps, ("facts", fact), value, lambda folder: training_facts(folder, read_index(folder)))


def test_files_renamed_to_another_step_are_refused_by_what_their_headers_say(three_steps):
    index = json.loads((three_steps / INDEX).read_text())
    for part, name in index["files"].items():
        index["files"][part] = name.replace("3", "9")
        (three_steps / name).rename(three_steps / index["files"][part])
    (three_steps / INDEX).write_text(json.dumps(index | {"step": 9}))
    for read in (load_model, lambda folder: resume(folder, state())):
        with pytest.raises(ValueError, match="step 9 and .* step 3"):
            read(three_steps)


def test_the_loss_scaler_of_an_index_is_one_of_ours_or_refused():
    ours = torch.amp.GradScaler("cpu").state_dict()
    checkpoint._check_scaler(ours, ours | {"scale": 128.0, "_growth_tracker": 7})
    checkpoint._check_scaler({}, {})
    for wrong in (
        {}, ours | {"scale": -1.0}, ours | {"scale": "x"}, ours | {"_growth_tracker": -1}, ours | {"growth_factor": 1e9},
        ours | {"_growth_tracker": 10**9}, ours | {"scale": None}, ours | {"more": 1}, ours | {"_growth_tracker": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="loss scaler"):
            checkpoint._check_scaler(ours, wrong)
    with pytest.raises(ValueError, match="no state"):
        checkpoint._check_scaler({}, ours)


def rewritten(folder, part, change):
    """Change the tensors of one file of the checkpoint."""
    path = folder / json.loads((folder / INDEX).read_text())["files"][part]
    tensors = load_file(path)
    change(tensors)
    path.write_bytes(save(tensors))


@pytest.mark.parametrize("name, row, value", [
    ("anchors", 0, 50), ("anchors", 0, -1), ("anchors", 0, 8), ("anchors", -1, 2**40), ("row_of_id", 0, 50), ("row_of_id", 3, -1),
    ("row_of_id", 0, 1),
])  # fmt: skip
def test_an_index_in_a_tensor_that_no_row_has_is_refused_when_it_is_loaded(three_steps, name, row, value):
    """Row 8 is the first with anchors here: they are rows before it."""
    rewritten(three_steps, "model", lambda tensors: tensors[f"embedding.{name}"][row].fill_(value))
    for read in (load_model, lambda folder: resume(folder, state())):
        with pytest.raises(ValueError, match=f"embedding.{name}|anchors of rows") as error:
            read(three_steps)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("how", ["shape", "type", "nan"])
def test_optimizer_tensors_of_another_shape_type_or_not_finite_are_refused(three_steps, key, how):
    def change(tensors):
        name = next(name for name in tensors if name.endswith(f":{key}"))
        tensor = tensors[name]
        changed = {"shape": torch.zeros(3), "type": tensor.long(), "nan": torch.full_like(tensor, torch.nan)}
        tensors[name] = changed[how]

    rewritten(three_steps, "training", change)
    with pytest.raises(ValueError, match=f":{key}"):
        resume(three_steps, state())


def test_an_order_of_tokens_that_is_none_is_refused(tmp_path):
    for order in (torch.arange(50).float(), torch.arange(50) + 1, torch.arange(50)[:, None], torch.arange(49)):
        save_checkpoint(tmp_path, state(), {}, resumable=False, token_order=order)
        with pytest.raises(ValueError, match="token order"):
            load_token_order(tmp_path)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    saved, broken = state(), state()
    save_checkpoint(tmp_path, saved, {})
    before = contents(tmp_path)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(Diverged, match="norm.weight is not finite at step 0"):
        save_checkpoint(tmp_path, broken, {})
    assert contents(tmp_path) == before
    rewritten(tmp_path, "model", lambda tensors: tensors["norm.weight"][0].fill_(torch.inf))
    with pytest.raises(ValueError, match="norm.weight is not finite"):
        load_model(tmp_path)


def test_an_index_as_large_as_no_index_is_refused_at_once(tmp_path):
    save_checkpoint(tmp_path, state(), {})
    (tmp_path / INDEX).write_text("[" + "1," * 30_000_000 + "1]")
    assert "more than 1 MiB" in str(at_once(lambda: load_model(tmp_path)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(three_steps):
    folder = three_steps
    (folder / "text").mkdir()
    for name in json.loads((folder / INDEX).read_text())["files"].values():
        good = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "no plain file" in str(at_once(lambda: resume(folder, state())))
        (folder / name).unlink()
        (folder / name).write_bytes(good)
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(folder / "pipe.txt.xz")
    for read in (split_file, file_text, read_token_file):
        for name in ("pipe.txt", "pipe.txt.xz"):
            assert "no plain file" in str(at_once(lambda read=read, name=name: read(folder / name)))
    os.mkfifo(folder / FILES["memory"])
    assert "no plain file" in str(at_once(lambda: read_report(folder / FILES["memory"], "memory")))


def test_a_save_removes_its_own_older_files_and_no_other(tmp_path):
    foreign = ["model.safetensors", "my_lora.safetensors", "model-00001-of-00002.safetensors", "model-00000007.safetensors", "x.safetensors"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"weights of another program")
    saved = state()
    for saved.step in (1, 2, 3):
        save_checkpoint(tmp_path, saved, {}, resumable=saved.step < 3)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*foreign, INDEX, "model-00000003.safetensors"])
    assert all((tmp_path / name).read_bytes() == b"weights of another program" for name in foreign)
    # one that an earlier version wrote, without a mark in its header, is the index's own too
    rewritten(tmp_path, "model", lambda tensors: None)
    saved.step = 4
    save_checkpoint(tmp_path, saved, {}, resumable=False)
    assert sorted(path.name for path in tmp_path.glob("model-*4.safetensors")) == ["model-00000004.safetensors"]
    assert not (tmp_path / "model-00000003.safetensors").exists()
