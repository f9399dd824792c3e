import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from phase1.config import EngineShape
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate import estimate
from phase1.measure.memory.estimate.fake_tensors import QuickFakeMode
from phase1.roster import ROLES, model_config
from phase1.training.step import train_step

# results of which no usual operator has the like: a part of a larger storage, and two of one storage
LIBRARY = torch.library.Library("phase1_test", "DEF")
LIBRARY.define("part(Tensor x) -> Tensor")
LIBRARY.define("pair(Tensor x) -> (Tensor, Tensor)")
LIBRARY.impl("part", lambda x: x.new_empty(2 * len(x))[: len(x)], "Meta")
LIBRARY.impl("pair", lambda x: (y := x.new_empty(len(x)), y.view(-1)), "Meta")


@pytest.fixture(autouse=True)
def as_users_run_it():
    torch.use_deterministic_algorithms(False)  # else every empty tensor is filled, through one more operator


OPERATORS = [
    lambda x: x * 2,
    lambda x: x.to(torch.int64) * 2,
    lambda x: x.to(torch.int64) * 2.0,  # like the one before, of another type
    lambda x: x + x.half(),
    lambda x: x.t() @ x,
    lambda x: x.t(),
    lambda x: x.t().contiguous(),
    lambda x: x[1:, ::2],
    lambda x: x.view(-1, 2).unsqueeze(1).expand(-1, 3, -1),
    lambda x: x[0:4].t(),
    lambda x: x[1:5].t(),  # like the one before, from further on
    lambda x: x.as_strided((2, 2), (1, 3), 5),
    lambda x: x.split(3),
    lambda x: x.unbind(1),
    lambda x: x.max(0),
    lambda x: x.add_(1),
    lambda x: x.add_(x),
    lambda x: torch.mul(x, 2, out=x),
    lambda x: torch.mul(x, torch.ones_like(x), out=x),
    lambda x: torch.cat([x, x[:1]]),
    lambda x: x.sum((0, 1)),
    lambda x: torch.zeros_like(x, dtype=torch.float16),
    lambda x: x.unsqueeze_(0),  # changes the argument itself
    lambda x: x.t_(),
    lambda x: x.detach(),
    lambda x: F.pad(x, (1, 2)),
    lambda x: F.embedding(torch.zeros(5, 2, dtype=torch.int64), x),
    lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, *x.shape)] * 3, is_causal=True),
    torch.ops.phase1_test.part,
    torch.ops.phase1_test.pair,
]


def facts(results, given):
    """All that can be seen of tensors, and whose storage they have."""
    results = results if isinstance(results, (tuple, list)) else [results]
    storages = [given.untyped_storage()._cdata]
    for item in results:
        if (storage := item.untyped_storage())._cdata not in storages:
            storages.append(storage._cdata)
        yield item.shape, item.stride(), item.storage_offset(), item.dtype, item.device, storage.nbytes()
        yield storages.index(storage._cdata), item is given


def test_what_is_remembered_is_what_pytorch_works_out():
    def look(operator):
        x = torch.empty(8, 6)
        return [*facts(operator(x), x), *facts(x, x)]

    with FakeTensorMode():
        expected = [look(operator) for operator in OPERATORS]
    with QuickFakeMode():
        for _ in range(3):
            assert [look(operator) for operator in OPERATORS] == expected


def test_one_tensor_twice_is_not_two_tensors():
    with QuickFakeMode() as mode:
        x, y, z = torch.empty(3), torch.empty(3), torch.empty(3)
    for _ in range(2):
        for args, out in (((x, y), x), ((x, y), y), ((x, y), z), ((x, x), x)):
            # not through torch, whose autograd returns `out` whatever a mode says
            assert mode.__torch_dispatch__(torch.ops.aten.mul.out, (), args, {"out": out}) is out


@pytest.fixture
def worked_out(monkeypatch):
    """The operators that were left to PyTorch, so far."""
    operators, original = [], FakeTensorMode.__torch_dispatch__

    def count(self, func, types, args=(), kwargs=None):
        operators.append(func)
        return original(self, func, types, args, kwargs or {})

    monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", count)
    return operators


def case(role, **changes):
    return MemoryCase(model_config(role, EngineShape(vocab_size=3000, **changes)), 2, 512)


@pytest.mark.parametrize("role", ROLES)
def test_a_step_takes_the_memory_it_takes_with_pytorchs_own_fake_tensors(monkeypatch, worked_out, role):
    one = case(role, d_model=64, n_layers=2, n_heads=2)
    quick, few = estimate.estimate_memory(one), len(worked_out)
    monkeypatch.setattr(QuickFakeMode, "__torch_dispatch__", FakeTensorMode.__torch_dispatch__)
    slow, all_of_them = estimate.estimate_memory(one), len(worked_out) - few
    assert few < all_of_them / 2  # the second was without
    assert quick.phase_bytes == slow.phase_bytes
    assert quick.peak_reserved_bytes == slow.peak_reserved_bytes
    assert (quick.breakdown, quick.top_modules) == (slow.breakdown, slow.top_modules)
    assert quick.timeline.events == slow.timeline.events


def test_an_estimate_walks_through_one_step(monkeypatch):
    steps = []
    monkeypatch.setattr(estimate, "train_step", lambda *args: steps.append(train_step(*args)))
    estimate.estimate_memory(case("baseline", d_model=64, n_layers=1, n_heads=2))
    assert len(steps) == 1


@pytest.mark.parametrize("role", ROLES)
def test_more_blocks_leave_nothing_more_to_work_out(worked_out, role):
    """This is what the time of an estimate depends on: `phase1 memory --dry-run` is to take less than 10 s on two cores."""
    counts = []
    for n_layers in (2, 8):
        worked_out.clear()
        estimate.estimate_memory(case(role, d_model=64, n_layers=n_layers, n_heads=2))
        counts.append(len(worked_out))
    assert counts[1] < 1.1 * counts[0]
    assert counts[1] < 1500
