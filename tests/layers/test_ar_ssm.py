import pytest
import torch

from phase1.layers.ar_ssm import ARSSM
from phase1.ops import ar_ssm
from phase1.ops.semiseparable import semiseparable_matrix
from phase1.ops.window_attention import window_attention_matrix


def layer(window=5, max_rank=4, min_rank=2):
    torch.manual_seed(0)
    return ARSSM(16, n_heads=2, max_rank=max_rank, min_rank=min_rank, window=window, memory=50).double()


@pytest.mark.parametrize("T", [1, 7, 130])
@pytest.mark.parametrize("window", [0, 5])
def test_chunked_recurrent_and_dense_forms_of_the_layer_are_one(T, window):
    mixer, h = layer(window), torch.randn(2, T, 16, dtype=torch.float64)
    chunked, _, _ = mixer(h)
    pieces, state = [], None
    for t in range(T):
        y, state, _ = mixer(h[:, t : t + 1], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), chunked, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dense_form(mixer, h), chunked, rtol=1e-9, atol=1e-10)


def dense_form(mixer, h):
    """(local + tril(U Vᵀ)) x with every matrix written out, each head's semiseparable part scaled to mean square 1."""
    o, gate, _ = mixer.operands(mixer.in_proj(h))
    semiseparable = semiseparable_matrix(o.u, o.v, o.log_decay) * o.dt.transpose(1, 2)[:, :, None]
    local = torch.diag_embed(mixer.D[:, None].expand(len(h), -1, h.shape[1]))
    if mixer.window:
        local = local + window_attention_matrix(o.q, o.k, 0, mixer.window)
    far = torch.einsum("bhts,bshp->bthp", semiseparable, o.x)
    far = far / (far.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.state_scale
    y = far + torch.einsum("bhts,bshp->bthp", local, o.x)
    y = y.flatten(2) * torch.nn.functional.silu(gate)
    return mixer.out_proj(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm)


@pytest.mark.parametrize("window", [0, 5])
def test_later_inputs_do_not_reach_earlier_outputs(window):
    mixer, h = layer(window), torch.randn(1, 100, 16, dtype=torch.float64)
    before = mixer(h)[0]
    h[:, 70] += 1
    after = mixer(h)[0]
    assert torch.equal(after[:, :70], before[:, :70])
    assert not torch.equal(after[:, 70], before[:, 70])


def test_the_state_does_not_grow_with_the_context():
    mixer = layer()
    sizes = {sum(part.numel() for part in mixer(torch.randn(1, T, 16).double())[1][1:]) for T in (5, 50, 500)}
    assert len(sizes) == 1


def test_ranks_below_min_rank_are_always_on_and_the_others_are_gated():
    mixer, h = layer(), torch.randn(1, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.rank_gate.out_proj.bias.fill_(-1e9)  # as closed as a network can make it
    gate = mixer.rank_gate(torch.randn(1, 9, mixer.rank_gate.hidden, dtype=torch.float64))
    assert torch.equal(gate[..., :2], torch.ones_like(gate[..., :2])) and torch.equal(
        gate[..., 2:], torch.zeros_like(gate[..., 2:])
    )
    assert mixer(h)[2] == 2.0


def test_the_gate_changes_the_output_and_learns():
    mixer, h = layer(), torch.randn(1, 9, 16, dtype=torch.float64)
    before, _, rank = mixer(h)
    (before.square().mean() + rank).backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.rank_gate.parameters())
    with torch.no_grad():
        mixer.rank_gate.out_proj.bias.fill_(-3)
    assert not torch.allclose(mixer(h)[0], before)


def test_the_state_fades_with_the_memory_even_where_the_input_lets_it_not():
    mixer, h = layer(), torch.randn(1, 200, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.dt_bias.fill_(-1e9)
    assert torch.equal(mixer.operands(mixer.in_proj(h))[0].log_decay.unique(), torch.tensor([-1 / 50], dtype=torch.float64))


def test_one_token_without_gradients_runs_in_its_kernels(monkeypatch):
    """In Triton's interpreter without a GPU."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixer = ARSSM(32, n_heads=2, max_rank=8, min_rank=2, window=5, memory=50).to(device)
    h, calls, kernels = torch.randn(2, 9, 32, device=device), [], ar_ssm.ar_ssm_step
    monkeypatch.setattr(ar_ssm, "fused_runs", lambda *_: True)
    monkeypatch.setattr("phase1.layers.ar_ssm.fused_runs", lambda *_: False)
    monkeypatch.setattr("phase1.layers.ar_ssm.ar_ssm_step", lambda *a, **k: calls.append(1) or kernels(*a, **k))
    wanted, last, _ = mixer(h)
    for in_memory in (False, True):
        calls.clear()
        with torch.no_grad():
            found, state, _ = mixer(h[:, :2])
            if in_memory:
                state = state._replace(position=torch.tensor(state.position, device=device))
            for t in range(2, 9):
                y, state, rank = mixer(h[:, t : t + 1], state)
                found = torch.cat([found, y], 1)
        assert len(calls) == 7 and rank.shape == () and int(state.position) == 9
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.S, last.S, rtol=1e-4, atol=1e-6)
    calls.clear()
    mixer(h[:, :1], last)
    mixer(h[:, :2], last)
    with torch.no_grad():
        mixer(h[:, :1])
    assert not calls  # gradients, two tokens, the first token
