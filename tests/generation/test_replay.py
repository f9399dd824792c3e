"""A graph keeps what it reads alive: of that a GPU would not tell."""

import gc
import weakref
from contextlib import nullcontext

import torch

from phase1.generation.replay import captured


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
