import pytest
import torch

from phase1.layers.attention import Attention


@pytest.mark.parametrize("grad", [False, True])
def test_states_give_what_one_pass_gives_and_stay_as_they_are(grad):
    torch.manual_seed(0)
    layer = Attention(16, 2).double()
    h = torch.randn(2, 12, 16, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        y = layer(h)[0]
        first, state, _ = layer(h[:, :5])
        for other in (torch.randn_like(h), h, h):  # the first two texts go on from one state, and so does the third
            parts, ours = [first], state
            for start, end in ((5, 6), (6, 9), (9, 12)):
                part, ours, _ = layer(other[:, start:end], ours)
                parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_step_writes_its_own_position_and_copies_the_others_only_when_room_runs_out():
    layer = Attention(16, 2)
    state = layer(torch.randn(1, 8, 16))[1]
    places = []
    for _ in range(24):
        state = layer(torch.randn(1, 1, 16), state)[1]
        places.append(state.store.k.data_ptr())
    assert len(set(places)) <= 3
