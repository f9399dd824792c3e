"""Arithmetic of a step against the card's peak (MFU), and bytes of the optimizer against its bandwidth."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from phase1.config import ModelConfig
from phase1.machine.cards import Card, card_named
from phase1.machine.isolate import run_here
from phase1.ops.cross_entropy import ALIGNMENT
from phase1.records.schema import Measurement, ThroughputResult
from phase1.trainable import LanguageModel, build

OPTIMIZER_BYTES = 20  # per float32 parameter: weight, gradient and a moment read (12), weight and moment written (8)
LINEAR_FROM = 8192  # tokens of a sequence
FAR = 16  # times that length: to count what is longer takes minutes


def step_flops(config: ModelConfig, batch_size: int, seq_length: int) -> int:
    """Model FLOPs: those of the matrix products in one training step, forward and backward, nothing computed twice.

    A product (m, k) x (k, n) is 2 m k n; nothing else is counted, nor what checkpointing computes again. Attention counts as
    its two products over all T x T pairs, the masked half too (PaLM, arXiv 2204.02311, appendix B): for the Transformer
    6 N B T + 12 L D B T^2, N being the weights of all matrices, the tied table once. Counted on tensors without contents, with
    1 and 2 blocks: blocks are alike, so more of them follow. So do lengths far past the windows of an AR-SSM model.
    """
    past_windows = max(LINEAR_FROM, 2 * config.copy_window, 2 * config.ar_ssm_window)
    if config.mixer == "ar_ssm" and seq_length > FAR * past_windows:
        start, double = (step_flops(config, batch_size, times * past_windows) for times in (1, 2))
        return start + (seq_length - past_windows) * (double - start) // past_windows
    # a fused kernel hides its products; materialised logits have columns of padding
    config = replace(config, checkpointing=False, attention="math", loss="chunked")
    if config.model is not None:  # whose layers may differ, or not depend on --n-layers
        return _counted(config, batch_size, seq_length)
    one, two = (_counted(replace(config, n_layers=layers), batch_size, seq_length) for layers in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


@lru_cache(maxsize=256)
def _counted(config: ModelConfig, batch_size: int, seq_length: int) -> int:
    with FakeTensorMode():
        model = build(config)
        ids = torch.zeros(batch_size, seq_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model.loss(ids, ids).backward()
        if not isinstance(model, LanguageModel):
            return int(counter.get_total_flops())
        hidden, table = torch.zeros(1, 1, config.d_model), model.embedding.table(torch.float32)
        (_, rows, *_), _ = model.output(hidden, table, ids[:1, :1])
        padding = -len(rows) % ALIGNMENT * rows.shape[1]  # rows of zeros, in all three products of the output
    return int(counter.get_total_flops()) - 3 * 2 * ids.numel() * padding


def card_of(environment: Mapping[str, Any]) -> tuple[Card | None, str]:
    """The card whose peaks count for a run in `environment`, and in words which peaks, or why none."""
    name, memory = environment.get("gpu"), environment.get("gpu_memory_bytes")
    if not name:
        return None, "no peak is known for a CPU"
    card = card_named(str(name), memory)
    if card is None:
        return None, f"no peak is known for {name}"
    return card, f"{card.fp16_flops / 1e12:.4g}e12 FP16 FLOP/s, {card.bandwidth_bytes_per_s / 1e9:.4g}e9 bytes/s ({card.name})"


def with_efficiency(
    result: ThroughputResult, config: ModelConfig, card: Card | None, basis: str, precision: str
) -> ThroughputResult:
    """`result` with FLOPs, MFU and optimizer bandwidth of every length that was measured.

    MFU = model FLOPs / (seconds of the median step x peak FLOP/s), the peak being that of FP16 products summed in FP32; for a
    run in another type there is none. Bandwidth = 20 bytes x parameters / optimizer seconds: weight, gradient and one moment
    are read, weight and moment written, the least that Muon moves; AdamW moves 28, and unscaling and clipping come on top,
    inside the same time. Of a whole step there is none, because what activations move depends on kernels and caches. On a card
    whose cache holds the parameters it says little.
    """
    if card is not None and precision not in ("float16", "bfloat16"):
        card, basis = None, f"no peak is known for {precision}"
    outcomes = {
        m.seq_length: run_here(step_flops, config, m.batch_size, m.seq_length) for m in result.measurements if m.status == "ok"
    }
    reasons = {f"FLOPs not counted: {outcome.message}" for outcome in outcomes.values() if outcome.value is None}
    measurements = [
        m if m.status != "ok" else _efficiency(m, outcomes[m.seq_length].value, result, card) for m in result.measurements
    ]
    return result.model_copy(
        update={"measurements": measurements, "peak_basis": basis, "warnings": [*result.warnings, *sorted(reasons)]}
    )


def _efficiency(m: Measurement, flops: int | None, result: ThroughputResult, card: Card | None) -> Measurement:
    update: dict[str, Any] = {}
    assert m.total_time_ms is not None
    if flops is not None:
        achieved = flops / (m.total_time_ms / 1e3)
        update |= {"model_flops": flops, "achieved_flops_per_second": achieved}
        update["mfu"] = achieved / card.fp16_flops if card else None
    if result.parameters is not None and m.optimizer_time_ms:
        moved = OPTIMIZER_BYTES * result.parameters.total / (m.optimizer_time_ms / 1e3)
        update["optimizer_bytes_per_second"] = moved
        update["bandwidth_utilization"] = moved / card.bandwidth_bytes_per_s if card else None
    return m.model_copy(update=update)
