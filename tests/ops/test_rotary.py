"""Angles of rotary positions as one operator: values, and what autograd keeps because of them."""

from functools import partial

import pytest
import torch

from phase1.layers import rotary as layer
from phase1.layers.attention import Attention
from phase1.ops.rotary import rotary_angles, rotary_angles_reference


def test_the_operator_is_its_definition():
    like = torch.zeros(2, 7, 3, 8, dtype=torch.float64)
    for found, wanted in zip(rotary_angles(like, 7, 4, 5), rotary_angles_reference(like, 7, 4, 5), strict=True):
        assert torch.equal(found, wanted)


def numbers_kept(forward):
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(sizes)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_angles_have_no_gradient_so_that_nothing_is_kept_for_it(monkeypatch, options):
    """Of an attention layer as on a GPU, where angles are an operator, autograd keeps what it keeps without one."""
    kept = {}
    for angles in (rotary_angles_reference, rotary_angles):
        monkeypatch.setattr(layer, "rotary_angles_reference", angles)
        torch.manual_seed(0)
        attention, x = Attention(32, 4, **options), torch.randn(2, 9, 32)
        kept[angles] = numbers_kept(partial(attention, x))
    assert kept[rotary_angles] == kept[rotary_angles_reference]
