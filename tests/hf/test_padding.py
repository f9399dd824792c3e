"""Padding on the left: a row of a padded batch is the row alone, in every mixer, through prefill, steps, beams and the loss."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hf.test_models import model

W, COPY = 8, 16  # windows of the model
PADS = [0, 1, 3, 4, W - 1, W, W + 1, COPY - 1, COPY, COPY + 1, 3 * W]
MODELS = [{}, {"mixer": "attention", "embedding": "dense", "copy_head": False}, {"ar_ssm_window": 0, "htt_output": "two_level"}]


def texts(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 512, (n,), generator=draw) for n in lengths]


def padded(rows, junk=7):
    """A batch and its mask; what is in the padding must not matter."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), junk), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, T - len(row) :], mask[i, T - len(row) :] = row, 1
    return ids, mask


def check_rows(m, rows, steps, atol):
    """Prefill and `steps` single tokens of the batch against every row alone."""
    ids, mask = padded(rows)
    new = torch.randint(1, 512, (len(rows), steps), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        out = m(ids, attention_mask=mask, use_cache=True)
        parts = [out.logits]
        for t in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = m(new[:, t : t + 1], attention_mask=mask, cache=out.cache)
            parts.append(out.logits)
        together = torch.cat(parts, 1)
        for i, row in enumerate(rows):
            alone = m(torch.cat([row, new[i]])[None]).logits[0]
            torch.testing.assert_close(together[i, -len(alone) :], alone, atol=atol, rtol=0)
            assert not together[i, : -len(alone)].any()


@pytest.mark.parametrize("changes", MODELS)
def test_every_row_of_a_padded_batch_is_the_row_alone(changes):
    m = model(**changes).double()
    for length in (1, 5, 30):
        check_rows(m, texts([length, *(length + pad for pad in PADS)]), steps=6, atol=1e-10)
    check_rows(model(**changes), texts([5, *(5 + pad for pad in PADS)]), steps=6, atol=1e-5)


FAST = {dtype: model().to(dtype) for dtype in (torch.float64, torch.float32)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]))
def test_rows_of_any_lengths_are_rows_alone(lengths, precision):
    dtype, atol = precision
    check_rows(FAST[dtype], texts(lengths), steps=3, atol=atol)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}])
@pytest.mark.parametrize("changes", MODELS[:2])
def test_generate_continues_every_row_as_it_does_alone(options, changes):
    m, rows = model(**changes), texts([3, 9, 9, 20])
    options |= {"max_new_tokens": 12, "min_new_tokens": 12}
    ids, mask = padded(rows, junk=0)
    together = m.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = m.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)
        assert together[i, -12:].tolist() == alone[0, -12:].tolist()


def test_positions_may_begin_anywhere_and_change_nothing():
    """As callers make them: from the mask, with anything at the padding, or of all columns; for one row or for all."""
    m, (ids, mask) = model(), padded(texts([3, 9, 20]))
    from_mask = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    columns = torch.arange(ids.shape[1])
    with torch.no_grad():
        expected = m(ids, attention_mask=mask).logits
        for positions in (from_mask, columns[None], columns[None].expand_as(ids) + 7):
            assert torch.equal(m(ids, attention_mask=mask, position_ids=positions).logits, expected)
        cache = m(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=from_mask[:, :-1], use_cache=True).cache
        last = m(ids[:, -1:], attention_mask=mask, position_ids=from_mask[:, -1:], cache=cache).logits
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-5, rtol=0)
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert m.generate(ids, position_ids=from_mask, **options).tolist() == m.generate(ids, **options).tolist()


def test_positions_of_packed_texts_are_refused():
    m, ids = model(), torch.arange(8)[None]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for call in (lambda: m(ids, position_ids=packed, labels=ids), lambda: m.generate(ids, position_ids=packed, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"rise by one along each row's text; got others, .*; give each text a row of its own"):
            call()
    with pytest.raises(ValueError, match=r"got shape \(3, 1, 8\) of ids \(1, 8\)"):
        m(ids, position_ids=packed.expand(3, 1, 8))
    with pytest.raises(ValueError, match=r"got shape \(1, 7\)"):
        m(ids, position_ids=packed[:, 1:])


def test_the_loss_of_a_padded_batch_is_that_of_its_rows():
    m, rows = model(), texts([1, 3, 9, 20])
    ids, mask = padded(rows)
    labels = ids.masked_fill(mask == 0, -100)
    labels[3, -5:] = -100  # not scored
    m.train()
    m(ids, attention_mask=mask, labels=labels).loss.backward()
    ours = {name: p.grad.clone() for name, p in m.named_parameters()}
    m.zero_grad()
    counts = [2, 8, 14]
    alone = [m(row[None], labels=labels[i : i + 1, -len(row) :]).loss for i, row in enumerate(rows)][1:]
    total = sum(loss * count for loss, count in zip(alone, counts)) / sum(counts)
    total.backward()
    for name, p in m.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-4)


def test_rows_keep_their_texts_when_a_cache_is_repeated_and_reordered():
    m, rows = model(), texts([4, 11, 11])
    ids, mask = padded(rows)
    with torch.no_grad():
        cache = m(ids, attention_mask=mask, use_cache=True).cache
        cache.batch_repeat_interleave(2)
        order = torch.tensor([5, 0, 2, 2])
        cache.reorder_cache(order)
        new = torch.tensor([[3], [4], [5], [6]])
        logits = m(new, cache=cache).logits
        for i, old in enumerate([2, 0, 1, 1]):
            alone = m(torch.cat([rows[old], new[i]])[None]).logits[0, -1]
            torch.testing.assert_close(logits[i, 0], alone, atol=1e-5, rtol=0)
