import pytest
import torch

from phase1.config import ModelConfig, TrainConfig
from phase1.layers.copy_head import CopyHead
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE
from phase1.training.checkpoint import load_model, save_checkpoint
from phase1.training.optimizers import parameter_groups
from phase1.training.step import make_train_state, train

B, T, D, V, WINDOW = 2, 13, 8, 6, 5
d = D // 2  # two heads


def config(**overrides):
    settings = {"vocab_size": V, "d_model": D, "n_layers": 1, "n_heads": 2, "mixer": "attention", "embedding": "dense"}
    ranks = {"ar_ssm_max_rank": 4, "ar_ssm_min_rank": 2, "ar_ssm_window": 4, "htt_rank": 2}
    return ModelConfig(**(settings | ranks | {"recompute": "none", "copy_head": True, "copy_window": WINDOW} | overrides))


def model(dtype=torch.float64, **overrides):
    """With a gate and a pointer far from their even beginnings."""
    torch.manual_seed(0)
    net = LanguageModel(config(**overrides)).to(dtype)
    if net.copy_head is not None:
        with torch.no_grad():
            net.copy_head.gate.normal_()
            net.copy_head.gate_bias.fill_(-0.5)
            net.copy_head.forget.normal_()
            net.copy_head.forget_bias.fill_(-0.5)
            net.copy_head.qk_proj.weight.normal_()
    return net


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T + 1), generator=generator)
    ids, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    targets[0, 3] = targets[1, -1] = IGNORE
    return ids, targets


def mixture_by_hand(net, ids):
    """p (B, T, V), token by token, from the formula."""
    head, table = net.copy_head, net.table()
    hidden = net._hidden(ids, table)[0]
    Wq, W1, W2 = head.qk_proj.weight.split(d)
    p = torch.zeros(*ids.shape, V, dtype=hidden.dtype)
    for b, h in enumerate(hidden):
        for t in range(len(h)):
            g = torch.sigmoid(head.gate @ h[t] + head.gate_bias[0])
            seen = range(max(0, t - WINDOW + 1), t + 1)
            keys = torch.stack([W1 @ h[j] + (W2 @ h[j - 1] if j else 0) for j in seen])
            f = torch.nn.functional.softplus(h @ head.forget + head.forget_bias)
            forgotten = torch.stack([f[j + 1 : t + 1].sum() for j in seen])
            a = (keys @ (Wq @ h[t]) / d**0.5 - forgotten).softmax(0)
            p[b, t] = (1 - g) * (table @ h[t]).softmax(0)
            for weight, j in zip(a, seen):
                p[b, t, ids[b, j]] += g * weight
    return p


@pytest.mark.parametrize("loss", ["chunked", "materialized"])
@pytest.mark.parametrize("recompute", ["block", "none"])
def test_losses_and_gradients_are_those_of_the_mixture_written_out(loss, recompute):
    net, (ids, targets) = model(loss=loss, recompute=recompute), batch()
    p = mixture_by_hand(net, ids)
    torch.testing.assert_close(p.sum(-1), torch.ones(B, T, dtype=p.dtype), rtol=1e-12, atol=0)
    torch.testing.assert_close(net(ids).exp(), p, rtol=1e-10, atol=1e-14)

    scored = targets != IGNORE
    expected = -p.gather(2, targets.where(scored, 0)[..., None])[..., 0].log() * scored
    nll, _ = net.nll(ids, targets)
    torch.testing.assert_close(nll, expected, rtol=1e-9, atol=1e-10)
    assert (nll[~scored] == 0).all()

    mean, leaves = expected.sum() / scored.sum(), tuple(net.parameters())
    got = net.loss(ids, targets)
    torch.testing.assert_close(got, mean, rtol=1e-9, atol=0)
    for mine, wanted in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(mean, leaves), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-10)


def test_a_target_that_nothing_matches_has_no_log_odds_and_moves_no_pointer():
    torch.manual_seed(0)
    head, ids = CopyHead(D, d, WINDOW).double(), torch.zeros(1, T, dtype=torch.long)
    hidden = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    targets = torch.ones_like(ids)
    targets[0, 4], targets[0, 6], ids[0, 0] = IGNORE, 0, 1  # 0 matches, 1 does for the window's length
    log_odds, *_ = head(hidden, ids, targets)
    matched = [t < WINDOW and t != 4 or t == 6 for t in range(T)]
    assert log_odds.isfinite()[0].tolist() == matched
    assert (log_odds[~log_odds.isfinite()] == -torch.inf).all()
    leaves = (hidden, head.qk_proj.weight)
    for gradient in torch.autograd.grad(log_odds, leaves, (~log_odds.isfinite()).double(), retain_graph=True):
        assert (gradient == 0).all()
    for gradient in torch.autograd.grad(log_odds, leaves, torch.ones_like(log_odds)):
        assert gradient.isfinite().all() and gradient.any()


def test_a_changed_token_changes_no_earlier_loss_and_no_earlier_distribution():
    net, (ids, targets) = model(), batch()
    before, p = net.nll(ids, targets)[0], net(ids)
    ids[:, 8] = (ids[:, 8] + 1) % V
    after, q = net.nll(ids, targets)[0], net(ids)
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q[:, :8], p[:, :8], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(q[:, 8], p[:, 8])
    _, targets = batch()
    targets[:, 8] = (targets[:, 8] + 1) % V  # a target is seen by its own loss alone
    changed = net.nll(ids, targets)[0] != after
    assert changed[:, 8].all() and changed.sum() == B


def test_the_head_leaves_the_rest_of_a_new_model_and_the_identity_of_models_without_it_as_they_are():
    torch.manual_seed(0)
    plain = LanguageModel(config(copy_head=False))
    torch.manual_seed(0)
    head = LanguageModel(config())
    assert all(torch.equal(head.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert len({config(copy_window=window).config_id for window in (5, 6)}) == 2
    assert len({config(copy_head=False, copy_window=window).config_id for window in (5, 6)}) == 1


def test_what_decays_and_learns_like_the_blocks():
    net = model()
    groups = parameter_groups(net, TrainConfig())
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    assert group_of[id(net.copy_head.qk_proj.weight)] == group_of[id(net.blocks[0].mixer.in_proj.weight)]
    for name in ("gate", "gate_bias", "forget", "forget_bias"):
        vector = net.get_parameter(f"copy_head.{name}")
        assert groups[group_of[id(vector)]]["weight_decay"] == 0 and groups[group_of[id(vector)]]["lr_scale"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mixer", ["attention", "ar_ssm"])
@pytest.mark.parametrize("recompute", ["block", "none"])
def test_a_model_with_the_head_trains_and_is_read_back(mixer, precision, recompute, tmp_path):
    torch.manual_seed(0)
    net = LanguageModel(config(mixer=mixer, recompute=recompute))
    ids, targets = batch()
    settings = TrainConfig(
        train_tokens=3 * B * T, train_batch_size=B, micro_batch_size=1, precision=precision, learning_rate=0.01
    )
    state = make_train_state(net, settings, "cpu")
    state.scaler = type(state.scaler)("cpu", init_scale=1024.0, enabled=precision == "fp16")
    state.micro_batch.scaler = state.scaler
    begin = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = []
    train(state, lambda step: (ids, targets), 3, lambda step, loss: losses.append(loss))
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in net.parameters())
    for name in ("copy_head.qk_proj.weight", "copy_head.gate", "copy_head.gate_bias", "copy_head.forget", "copy_head.forget_bias"):
        assert not torch.equal(net.get_parameter(name), begin[name]), name
    net.loss(ids, targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.copy_head.parameters())
    save_checkpoint(tmp_path, state, {})
    torch.testing.assert_close(load_model(tmp_path)[0].nll(ids, targets)[0], net.nll(ids, targets)[0], rtol=0, atol=0)


@pytest.mark.parametrize("pieces", [(1,) * T, (4, 9), (6, 1, 6)], ids=str)
@pytest.mark.parametrize("mixer", ["attention", "ar_ssm"])
def test_a_text_goes_on_from_a_state_that_does_not_grow(pieces, mixer):
    net, (ids, _) = model(mixer=mixer), batch()
    log_p, states = [], None
    for piece in ids.split(pieces, 1):
        part, states = net.continue_from(piece, states)
        log_p.append(part)
        assert states[-1].k.shape[1] <= WINDOW and states[-1].ids.shape == states[-1].k.shape[:2]
    torch.testing.assert_close(torch.cat(log_p, 1), net(ids), rtol=1e-9, atol=1e-9)


def test_no_window_is_named():
    with pytest.raises(ValueError, match="--copy-window"):
        config(copy_window=0)
