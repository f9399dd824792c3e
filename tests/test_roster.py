"""Names of models in reports, parsed and made in one place."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase1.config import EngineShape
from phase1.roster import CONTROLS, PAIRS, ROLES, VARIANTS, Key, model_config

PACKAGE = Path(__file__).parents[1] / "src" / "phase1"
NAMES = [*ROLES, *CONTROLS, *VARIANTS, "transformer", "mine"]
NAMES.remove("phase1")
SEEDS = st.none() | st.integers(0, 999_999_999)


@given(st.sampled_from(NAMES), SEEDS)
def test_a_name_and_its_seed_come_back(name, seed):
    key = Key(name, seed=seed)
    assert Key.parse(str(key)) == key and key.model == name and key.ranks is None


@given(st.integers(1, 999_999_999), st.integers(1, 999_999_999), SEEDS)
def test_an_engine_its_ranks_and_its_seed_come_back(htt, ar_ssm, seed):
    key = Key("phase1", htt, ar_ssm, seed)
    assert Key.parse(str(key)) == key and key.is_engine and key.ranks == (htt, ar_ssm)
    assert key.model == f"phase1_htt{htt}_ar{ar_ssm}" and key.baseline == Key("baseline", seed=seed)


@given(st.text())
def test_any_text_is_a_key_that_gives_it_back(text):
    assert str(Key.parse(text)) == text


@pytest.mark.parametrize("text", ["phase1_htt0_ar4", "phase1_htt16", "a_seed01", "a_seed", "seeded", "phase1_ar4_htt4", "_seed1x"])
def test_what_only_looks_like_ranks_or_a_seed_is_a_name(text):
    assert Key.parse(text) == Key(text)


def test_the_key_of_a_config_is_that_of_the_report():
    engine = model_config("phase1", EngineShape(), htt_rank=8, ar_ssm_max_rank=16)
    assert str(Key.of(engine)) == "phase1_htt8_ar16"
    baseline = replace(engine, **ROLES["baseline"])
    for name, entry in VARIANTS.items():
        base = engine if entry.base == "phase1" else baseline
        change = entry.change(base) if callable(entry.change) else entry.change
        found = str(Key.of(replace(base, **change)))
        assert found == ("phase1_htt8_ar16" if name in ("no_gate", "no_copy", "equal_parameters") else name)


def test_every_pair_of_mixer_and_table_has_the_name_that_reports_have():
    engine = model_config("phase1", EngineShape())
    found = {str(Key.of(replace(engine, mixer=mixer, embedding=table))) for mixer in ("ar_ssm", "attention") for table in ("htt", "dense")}
    assert found == {"phase1_htt16_ar32", "ar_ssm_dense", "attention_htt", "transformer_copy"}
    assert PAIRS == ("ar_ssm_htt", "ar_ssm_dense", "attention_htt", "attention_dense")


def test_baselines_are_known_by_their_names():
    assert all(Key(name).is_baseline for name in ("baseline", "baseline_optimized", "baseline_fast", "baseline_again"))
    assert not any(Key.parse(text).is_baseline for text in ("phase1", "transformer_copy", "quadratic_control", "baselined"))


def test_nobody_else_takes_the_name_of_a_model_apart():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "roster.py":
            strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and type(n.value) is str}
            assert not any(text in ("_seed", "phase1_htt") or "_htt(" in text or "htt\\d" in text for text in strings), path
