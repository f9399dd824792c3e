import gc
import os
import signal
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """What leaves part of its output unwritten must fail, whatever was in that memory before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def gpu_memory_is_given_back():
    """What a test leaves in PyTorch's cache would count as another program's memory in a test of a child process."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def offline_ends_with_its_test():
    """--offline holds for the rest of a process, which here is that of other tests too."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None and os.environ.pop(name, None) is not None:
            for loaded in ("huggingface_hub.constants", "datasets.config"):
                if name == "HF_HUB_OFFLINE" and loaded in sys.modules:
                    sys.modules[loaded].HF_HUB_OFFLINE = False


@pytest.fixture
def interrupts_arrive():
    """A shell starts what it puts in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, to look at what is in them."""
    from phase1.plots import figure, losses, memory, perplexity, throughput, timeline, training

    figures = []
    save = figure.save
    for module in (losses, memory, perplexity, throughput, timeline, training):
        monkeypatch.setattr(module, "save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures
