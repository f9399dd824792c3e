"""Perplexity of one model on one text: every token scored exactly once, sums in float64."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from phase1.config import content_id
from phase1.model import LanguageModel
from phase1.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Protocol:
    """What is scored, and on what each target is conditioned; numbers of different protocols are not compared.

    The text is cut into windows of `seq_length` targets, side by side. A target sees the earlier tokens of its window
    and the one token before the window (`prefix` before the first), so no token is scored twice and none is left out.
    """

    dataset_sha256: str
    tokenizer_sha256: str
    split: str
    seq_length: int
    prefix: int
    max_windows: int | None
    windowing: str = "side by side, one token of context before the window"

    @property
    def protocol_hash(self) -> str:
        return content_id(asdict(self))


@dataclass(frozen=True)
class Evaluation:
    """Losses of every window, in order; the text's sums follow from them."""

    nll_nats: np.ndarray  # (windows,) float64, summed over the window's targets
    tokens: np.ndarray  # (windows,) int64
    effective_rank: float | None

    @property
    def loss(self) -> float:
        """Nats per target."""
        return float(self.nll_nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    def bits_per_byte(self, byte_count: int) -> float:
        """Σ nll / ln 2 / UTF-8 bytes of the scored text."""
        return float(self.nll_nats.sum() / math.log(2) / byte_count)

    def word_perplexity(self, word_count: int) -> float:
        """exp(Σ nll / words of the scored text), with every newline a word, as WikiText is reported."""
        return _exp(float(self.nll_nats.sum() / word_count))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e^700 is the end of float64; a text of one word must not overflow a report


def windows(ids: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (windows, seq_length) int64 each; what is beyond the text is 0 and not scored.

    Raises ValueError if the text is empty.
    """
    if len(ids) == 0:
        raise ValueError("the evaluation text is empty; expected at least one token; choose another split or data set")
    count = math.ceil(len(ids) / protocol.seq_length)
    count = count if protocol.max_windows is None else min(count, protocol.max_windows)
    targets = np.asarray(ids[: count * protocol.seq_length], dtype=np.int64)
    inputs = np.concatenate([[protocol.prefix], targets[:-1]])
    fill = count * protocol.seq_length - len(targets)
    shape = (count, protocol.seq_length)
    return np.pad(inputs, (0, fill)).reshape(shape), np.pad(targets, (0, fill), constant_values=IGNORE).reshape(shape)


@torch.no_grad()
def evaluate(
    model: LanguageModel, ids: np.ndarray, protocol: Protocol, *, batch_size: int, dtype: torch.dtype, label: str = ""
) -> Evaluation:
    """Score `ids` under `protocol`, on the model's device, autocast to `dtype` (float32: none).

    `batch_size` windows at once; it does not change the result beyond rounding.
    """
    inputs, targets = windows(ids, protocol)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll, ranks = [], []
    for start in tqdm(range(0, len(inputs), batch_size), desc=f"evaluate {label}".rstrip(), unit="batch", disable=None):
        batch = [torch.from_numpy(part[start : start + batch_size]).to(device) for part in (inputs, targets)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses, effective_rank = model.nll(*batch)
        nll.append(losses.double().sum(1))
        ranks += [] if effective_rank is None else [effective_rank * len(losses)]
    model.train(was_training)
    rank = float(torch.stack(ranks).sum() / len(inputs)) if ranks else None
    return Evaluation(torch.cat(nll).cpu().numpy(), (targets != IGNORE).sum(1), rank)


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats per token of the text's own token frequencies: what ignoring all context reaches at best."""
    counts = np.bincount(ids)
    share = counts[counts > 0] / len(ids)
    return float(-(share * np.log(share)).sum())
