import pytest
import torch
import torch.nn.functional as F

from phase1.layers.mlp import MLP, swiglu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 2), (0, 4)])
def test_swiglu_and_its_gradient_are_those_of_its_operators_to_the_bit(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    given, d_result = torch.randn(shape, generator=generator).to(dtype), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    ours, theirs = (given.clone().requires_grad_() for _ in range(2))
    gate, up = theirs.chunk(2, -1)
    wanted, found = F.silu(gate) * up, swiglu(ours)
    wanted.backward(d_result)
    found.backward(d_result)
    assert torch.equal(found, wanted) and torch.equal(ours.grad, theirs.grad)
    assert torch.equal(ours, given)


def test_the_gradient_of_a_strided_argument_is_right():
    wide = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: swiglu(x[:, 3:13]), wide)
    assert torch.autograd.gradcheck(lambda x: swiglu(x.T[:8].T), wide)


def test_an_mlp_keeps_the_argument_of_swiglu_and_what_it_projects():
    mlp, kept = MLP(48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        mlp(torch.randn(5, 48, requires_grad=True))
    assert sorted(size for size in kept if size[0] == 5) == [(5, 48), (5, 128), (5, 256)]


def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    mlp, h = MLP(48), torch.randn(5, 48)
    expected = torch.autograd.grad(mlp(h).square().sum(), list(mlp.parameters()))
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(h).square().sum(), list(mlp.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
