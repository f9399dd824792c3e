"""A graph keeps what it reads alive: of that a GPU would not tell."""

import gc
import weakref
from contextlib import nullcontext

import torch

from phase1.generation.replay import _copy, captured
from phase1.layers.copy_head import CopyState


class Graph:
    def replay(self): ...


def test_what_a_graph_reads_lives_as_long_as_it_can_be_launched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    read = torch.ones(3)
    alive = weakref.ref(read)
    launch, _ = captured(lambda read=read: read + 1, warm=True)
    del read
    gc.collect()
    assert alive() is not None
    launch()
    del launch
    gc.collect()
    assert alive() is None


def test_a_state_is_copied_with_a_launch_for_each_type_and_layout():
    wide = torch.arange(6.0).view(1, 3, 2)
    state = [CopyState(wide.half(), wide.half(), wide[0], wide.long()), CopyState(*[wide[:, 1:]] * 3, wide.long()[:, 1:])]
    mine = [layer._make(torch.zeros_like(part, memory_format=torch.contiguous_format) for part in layer) for layer in state]
    launches = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            launches.append(f)
            return f(*args, **(kwargs or {}))

    with Watching():
        _copy(mine, state)
    assert all(torch.equal(a, b) for new, old in zip(mine, state) for a, b in zip(new, old))
    assert launches == [torch.ops.aten._foreach_copy_.default] * 5
