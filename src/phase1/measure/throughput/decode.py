"""Cost of generation: the speed of reading a context, the speed of one more token after it, and the size of the state."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from phase1.config import ModelConfig
from phase1.errors import is_out_of_memory
from phase1.generation.decoder import PIECE, Decoder, States, state_bytes
from phase1.generation.replay import again, captured
from phase1.measure.workload import SEED, make_workload
from phase1.model import LanguageModel
from phase1.progress import progress
from phase1.records.schema import DecodePoint, Decoding
from phase1.stats.decoding import judge
from phase1.stats.step_times import median, median_interval
from phase1.training.step import compute_dtype

ROLES = ("baseline", "phase1")  # the optimised Transformer differs from the other in training alone
Step = Callable[[], object]


class _Contexts:
    """One model after every context: its state, its reading speed, and a function that takes one more step."""

    def __init__(
        self, config: ModelConfig, contexts: Sequence[int], graphs: bool, device: str, update: Callable[[int], object]
    ) -> None:
        model = make_workload(config, device).model
        assert isinstance(model, LanguageModel)  # ThroughputRun lets no other stand for one of `ROLES`
        self.decoder = Decoder(model, None, compute_dtype("auto", device))
        self.prefill: dict[int, float] = {}  # tokens per second
        self.bytes: dict[int, int] = {}
        self.steps: dict[int, Step] = {}
        self.times: dict[int, list[float]] = {context: [] for context in contexts}
        ids = torch.randint(config.vocab_size, (1, max(contexts)), generator=torch.Generator().manual_seed(SEED)).to(device)
        begun = self.decoder.advance(ids[:, :PIECE], None)[1]  # warm-up: handles and workspaces are made once,
        self.decoder.advance(ids[:, :PIECE], begun)  # and kernels for a text that goes on
        state, read = None, 0
        for context in contexts:
            _wait(device)
            began = time.perf_counter()
            for piece in ids[:, read:context].split(PIECE, 1):
                _, state = self.decoder.advance(piece, state)
                update(piece.shape[1])
            _wait(device)
            self.prefill[context] = (context - read) / (time.perf_counter() - began)
            read = context
            assert state is not None
            self.bytes[context] = state_bytes(state)
            self.steps[context] = self._step(ids[:, :1], state, graphs)

    def _step(self, ids: Tensor, state: States, graphs: bool) -> Step:
        """A function that generates one token after the same context at every call."""
        step = again(self.decoder.advance, ids, state, self.decoder.model.config.copy_window if graphs else None)
        return captured(step)[0] if graphs else step


def measure_decoding(
    models: Mapping[str, ModelConfig], contexts: Sequence[int], warmup_steps: int, measure_steps: int, graphs: bool, device: str
) -> dict[str, Decoding]:
    """Tokens/s and bytes of the state of engine and Transformer over `contexts`, B = 1, random weights and tokens.

    Rounds take one step of every model after every context in turn, so that what slows the machine down slows all alike.
    A model that runs out of memory is left out.
    """
    contexts = sorted(set(contexts))
    wanted = {role: models[role] for role in ROLES if role in models}
    found: dict[str, _Contexts] = {}
    rounds = warmup_steps + measure_steps
    with progress(total=len(wanted) * contexts[-1], desc="read contexts", unit="tok", unit_scale=True) as bar:
        for role, config in wanted.items():
            try:
                found[role] = _Contexts(config, contexts, graphs, device, bar.update)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
    for i in progress(range(rounds), desc="generate", unit="round"):
        for model in found.values():
            for context, step in model.steps.items():
                seconds = _seconds(step, device)
                if i >= warmup_steps:
                    model.times[context].append(seconds * 1e3)
    return {role: judge([_point(model, context) for context in contexts]) for role, model in found.items()}


def _point(model: _Contexts, context: int) -> DecodePoint:
    times = model.times[context]
    interval = median_interval(times)
    return DecodePoint(
        context=context,
        prefill_tokens_per_second=model.prefill[context],
        decode_tokens_per_second=1e3 / median(times),
        decode_tokens_per_second_ci95=None if interval is None else (1e3 / interval[1], 1e3 / interval[0]),
        state_bytes=model.bytes[context],
        step_times_ms=times,
    )


def _seconds(step: Step, device: str) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
