import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1.generation import Sampling, continuation, text_of
from tests.generation.test_decoder import BYTES, decoder, text

PLAIN = Sampling(1.0)


def draw(d, sampling=PLAIN, prompt=(1, 2, 3), **options):
    log_p, state = d.prefill(list(prompt))
    return list(continuation(d, log_p, state, sampling, **({"max_tokens": 12, "seed": 0} | options)))


def never_ends(d):
    d.model.embedding.output_bias.data[BYTES.end_of_text] = -1e4
    d.model.copy_head = None
    return type(d)(d.model, BYTES)


def test_equal_seeds_give_equal_texts_and_samples_do_not_depend_on_each_other():
    d = never_ends(decoder())
    first, second = (draw(d, sample=i) for i in range(2))
    assert first == draw(d) and first != second != draw(d, seed=1)
    log_p, state = d.prefill([1, 2, 3])
    for i, expected in ((1, second), (0, first)):  # in any order, from one state
        assert list(continuation(d, log_p, state, Sampling(1.0), max_tokens=12, seed=0, sample=i)) == expected


def test_a_text_ends_before_end_of_text_and_after_max_tokens():
    d = never_ends(decoder())
    assert len(draw(d, max_tokens=7)) == 7
    d.model.embedding.output_bias.data[BYTES.end_of_text] = 1e4
    assert draw(type(d)(d.model, BYTES)) == []


def test_greedy_text_is_the_argmax_of_whole_passes():
    d = never_ends(decoder())
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(d.model(torch.tensor([ids]))[0, -1, :257].argmax()))
    assert draw(d, Sampling(0.0), max_tokens=10) == ids[3:]


def test_no_step_is_taken_whose_token_is_not_wanted(monkeypatch):
    d = never_ends(decoder())
    steps, step = [], d.step
    monkeypatch.setattr(d, "step", lambda id, state: (steps.append(id), step(id, state))[1])
    draw(d, max_tokens=5)
    assert len(steps) == 4


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_pieces_of_text_make_up_the_whole_and_no_character_comes_in_halves(expected):
    pieces = list(text_of(BYTES.encode(expected), BYTES))
    assert "".join(pieces) == expected and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces).replace(expected, "")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=20))
def test_any_ids_are_text(ids):
    assert "".join(text_of(ids, BYTES)) == BYTES.decode(ids)


@pytest.mark.parametrize("length", [1, 300])
def test_prompts_of_any_length_go_on(length):
    assert len(draw(never_ends(decoder()), prompt=text(length), max_tokens=3)) == 3
