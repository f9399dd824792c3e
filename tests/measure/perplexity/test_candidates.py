from dataclasses import replace

import pytest

from phase1.config import EngineShape
from phase1.measure.perplexity.candidates import candidates, parameter_count, variant
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.runs import PerplexityRun

ENGINE = model_config("phase1", EngineShape(vocab_size=2000, d_model=16, n_heads=2, n_layers=2, htt_dense_rows=20, htt_groups=10, htt_rank=2, ar_ssm_max_rank=6))


def test_parameters_are_counted_without_making_the_model():
    for role in ("baseline", "phase1"):
        config = replace(ENGINE, **{"mixer": "attention", "embedding": "dense"} if role == "baseline" else {})
        assert parameter_count(config) == LanguageModel(config).parameter_counts()["total"]


def test_every_variant_changes_one_thing_of_the_engine():
    dense = ("embedding", "dense_start")
    for name, changes in {"ar_ssm_dense": dense, "ar_ssm_dense_no_copy": (*dense, "copy_head"), "attention_htt": ("mixer",), "no_gate": ("ar_ssm_min_rank",), "no_copy": ("copy_head",), "equal_parameters": ("n_layers",)}.items():
        changed = variant(name, ENGINE)
        assert all(getattr(changed, field) != getattr(ENGINE, field) for field in changes)
        assert replace(changed, **{field: getattr(ENGINE, field) for field in changes}) == ENGINE


def test_the_transformer_with_a_copy_head_is_the_baseline_with_that_changed_and_the_same_loss_in_chunks():
    run = PerplexityRun(variants=("transformer_copy",))
    baseline, changed = (candidate.config for candidate in candidates(run) if candidate.key in ("baseline", "transformer_copy"))
    assert changed == replace(baseline, copy_head=True, loss="chunked")


def test_where_even_one_layer_is_too_many_equal_parameters_says_so():
    tiny = replace(ENGINE, vocab_size=60, n_layers=1, htt_rank=8)
    with pytest.raises(ValueError, match="raise --d-model"):
        variant("equal_parameters", tiny)


def test_equal_parameters_is_the_deepest_engine_no_larger_than_the_baseline():
    large = model_config("phase1", EngineShape())
    deep, limit = variant("equal_parameters", large), parameter_count(model_config("baseline", EngineShape()))
    assert parameter_count(deep) <= limit < parameter_count(replace(deep, n_layers=deep.n_layers + 1))


def test_repetitions_have_the_seeds_that_follow_and_names_that_say_so():
    run = PerplexityRun(seed=3, repeats=2, variants=("no_gate",), test_htt_ranks=(8, 16))
    found = [(c.key, c.seed) for c in candidates(run)]
    plain = ["baseline", "phase1_htt8_ar32", "phase1_htt16_ar32", "no_gate"]
    assert found == [(key, 3) for key in plain] + [(f"{key}_seed4", 4) for key in plain]


@pytest.mark.parametrize("value", ["baseline", "x=y", "phase1_htt16=z", "baseline_seed=z", "no_gate_2=z"])
def test_a_wrong_checkpoint_argument_is_named(value):
    with pytest.raises(ValueError, match="must be a folder, or NAME=PATH"):
        candidates(PerplexityRun(checkpoint=(value,)))


def test_checkpoints_may_have_names_of_their_own(monkeypatch, tmp_path):
    index = {"model_config": {f: getattr(ENGINE, f) for f in ENGINE.__dataclass_fields__}, "train_config": {"seed": 5}}
    monkeypatch.setattr("phase1.measure.perplexity.candidates.read_index", lambda path: index)
    found = candidates(PerplexityRun(checkpoint=(f"first={tmp_path}", f"second={tmp_path}")))
    assert [(c.key, str(c.checkpoint), c.seed) for c in found] == [(name, str(tmp_path), 5) for name in ("first", "second")]
    for reserved in ("phase1_mine", "Mine", "a b"):
        with pytest.raises(ValueError, match="NAME of small letters"):
            candidates(PerplexityRun(checkpoint=(f"{reserved}={tmp_path}",)))


def test_checkpoints_are_evaluated_alone_and_each_once(monkeypatch):
    index = {"model_config": {f: getattr(ENGINE, f) for f in ENGINE.__dataclass_fields__}, "train_config": {"seed": 5}}
    monkeypatch.setattr("phase1.measure.perplexity.candidates.read_index", lambda path: index)
    found = candidates(PerplexityRun(checkpoint=("phase1_htt2_ar6=a", "no_gate=b", "phase1_htt2_ar6_seed5=c")))
    assert [(c.key, str(c.checkpoint), c.seed) for c in found] == [("phase1_htt2_ar6", "a", 5), ("no_gate", "b", 5), ("phase1_htt2_ar6_seed5", "c", 5)]
    copying = {"model_config": index["model_config"] | {"mixer": "attention", "embedding": "dense"}, "train_config": {}}
    monkeypatch.setattr("phase1.measure.perplexity.candidates.read_index", lambda path: copying if path == "t" else index)
    assert [c.key for c in candidates(PerplexityRun(checkpoint=("transformer_copy=t", "no_copy=a")))] == ["transformer_copy", "no_copy"]
    with pytest.raises(ValueError, match="the model there is transformer_copy; use that name"):
        candidates(PerplexityRun(checkpoint=("baseline=t",)))
    with pytest.raises(ValueError, match="every model once"):
        candidates(PerplexityRun(checkpoint=("no_gate=a", "no_gate=b")))
    with pytest.raises(ValueError, match="the model there is phase1_htt2_ar6; use that name"):
        candidates(PerplexityRun(checkpoint=("baseline=a",)))
