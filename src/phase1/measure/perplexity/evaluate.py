"""Perplexity of one model on one text: every token scored exactly once, sums in float64."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from phase1.config import content_id
from phase1.ops.cross_entropy import IGNORE
from phase1.parallel import group
from phase1.progress import progress
from phase1.trainable import Trainable
from phase1.training.pieces import in_pieces

LARGEST_NATS: Final = 700.0  # e^709 is the end of float64


@dataclass(frozen=True)
class Protocol:
    """What is scored, and on what each target is conditioned; numbers of different protocols are not compared.

    A window holds T = `seq_length` targets in a row, the last one what is left; window k begins with target k S,
    S = `stride`, 1 ≤ S ≤ T. The first window scores all its targets, every other one the last S, which no earlier window
    holds: no token is scored twice and none is left out. The target at place i of its window sees the i tokens of the
    window before it and the one token before the window (`prefix` before the first), so past the first window at least
    T - S + 1 tokens. S = T is side by side. These are the windows of lm-eval 0.4 (`get_rolling_token_windows`, context_len =
    T - S + 1) but for the last one, which lm-eval moves back until it is full: its few targets see more there.
    """

    dataset_sha256: str
    tokenizer_sha256: str
    split: str
    seq_length: int
    stride: int
    prefix: int
    max_windows: int | None

    @property
    def protocol_hash(self) -> str:
        facts = asdict(self) | {"windowing": "sliding, one token of context before the window"}
        if self.stride == self.seq_length:
            facts["windowing"] = "side by side, one token of context before the window"
            del facts["stride"]  # as before there was one: equal protocols keep equal hashes
        return content_id(facts)


@dataclass(frozen=True)
class Evaluation:
    """The loss of every target, in the order of the text; the text's numbers follow from them."""

    losses: np.ndarray  # (targets,) nats, at least float32
    places: np.ndarray  # (targets,) int64, tokens of its window before each target
    tokens: np.ndarray  # (windows,) int64, targets that each window scores
    effective_rank: float | None

    @property
    def nll_nats(self) -> np.ndarray:
        """(windows,) float64, summed over the targets that each window scores."""
        return np.add.reduceat(self.losses, np.cumsum(self.tokens) - self.tokens, dtype=np.float64)

    @property
    def loss(self) -> float:
        """Nats per target."""
        return float(self.nll_nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """e to the loss, which must be at most LARGEST_NATS."""
        return math.exp(self.loss)

    def bits_per_byte(self, byte_count: int) -> float | None:
        """Σ nll / ln 2 / UTF-8 bytes of the scored text; perplexity per byte is 2 to this. None for a text of no bytes."""
        return float(self.nll_nats.sum() / math.log(2) / byte_count) if byte_count else None

    def word_perplexity(self, word_count: int) -> float | None:
        """exp(Σ nll / words of the scored text), with every newline a word, as WikiText is reported.

        None for a text of no words, or of so few that it is past the end of float64.

        lm-eval has the same formula and another count: it splits at white space, in which a newline is no word of its own
        (and white space at an end adds an empty word). It also rejoins WikiText's punctuation before it scores the text,
        and scores no end-of-text.
        """
        nats = float(self.nll_nats.sum() / word_count) if word_count else math.inf
        return math.exp(nats) if nats <= LARGEST_NATS else None


def target_count(ids: np.ndarray, protocol: Protocol) -> int:
    """How many tokens at the beginning of `ids` are scored."""
    if protocol.max_windows is None:
        return len(ids)
    return min(len(ids), protocol.seq_length + (protocol.max_windows - 1) * protocol.stride)


def windows(ids: np.ndarray, protocol: Protocol, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, (≤ batch_size, ≤ seq_length) int64 each, IGNORE where a target is not scored, in text order.

    Nothing is padded: a last window that the end of the text cuts short is a batch of its own.
    Raises ValueError if the text is empty.
    """
    if len(ids) == 0:
        raise ValueError("the evaluation text is empty; expected at least one token; choose another split or data set")
    T, S = protocol.seq_length, protocol.stride
    targets_end = target_count(ids, protocol)
    count = 1 + math.ceil(max(0, targets_end - T) / S)
    full = max(0, targets_end - T + S) // S
    stream = np.append(np.asarray([protocol.prefix], ids.dtype), ids)  # target i is stream[i + 1] and follows stream[i]
    batches = [range(first, min(first + batch_size, full)) for first in range(0, full, batch_size)]
    for numbers in [*batches, range(full, count)]:
        if numbers:
            places = np.arange(min(T, targets_end - numbers[0] * S))
            positions = S * np.asarray(numbers)[:, None] + places
            scored = (places >= T - S) | (positions[:, :1] == 0)
            inputs, targets = stream[positions].astype(np.int64), stream[positions + 1].astype(np.int64)
            yield inputs, np.where(scored, targets, IGNORE)


@torch.no_grad()
def evaluate(
    model: Trainable, ids: np.ndarray, protocol: Protocol, *, batch_size: int, dtype: torch.dtype, label: str | None = "",
    piece_length: int | None = None,
) -> Evaluation:  # fmt: skip
    """Score `ids` under `protocol`, on the model's device, autocast to `dtype` (float32: none).

    `batch_size` windows at once, `piece_length` tokens of each at a time (None: all); neither changes the result beyond
    rounding. No progress is shown where `label` is None. Ranks take the batches in turn, and all get the result, bit for bit
    that of one process.
    """
    device = next(model.parameters()).device
    at_once: tuple[Any, ...] = (piece_length,) if piece_length and in_pieces(model.config, piece_length) else ()
    was_training = model.training
    model.eval()

    def score(inputs: np.ndarray, targets: np.ndarray) -> _Scores:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            batch = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
            nll, effective_rank = model.nll(*batch, *at_once)
        return nll.cpu().numpy()[targets != IGNORE], None if effective_rank is None else effective_rank.item() * inputs.size

    mine: list[_Scores] = []
    places, tokens, inputs_seen = [], [], 0
    desc = f"evaluate {label}".rstrip()
    with progress(desc=desc, total=target_count(ids, protocol), unit="tok", disable=label is None) as bar:
        for number, (inputs, targets) in enumerate(windows(ids, protocol, batch_size)):
            scored = targets != IGNORE
            places.append(np.nonzero(scored)[1])
            tokens.append(scored.sum(1))
            bar.update(int(scored.sum()))
            inputs_seen += inputs.size
            if number % group.size() == group.rank():
                mine.append(score(inputs, targets))
    if len(mine) * group.size() < len(tokens):  # ranks that share their parameters call the model together: once more
        score(inputs, targets)
    model.train(was_training)
    parts = group.gathered(mine)
    every = [parts[number % len(parts)][number // len(parts)] for number in range(len(tokens))]
    ranks = [rank for _, rank in every if rank is not None]
    return Evaluation(
        losses=np.concatenate([losses for losses, _ in every]),
        places=np.concatenate(places),
        tokens=np.concatenate(tokens),
        effective_rank=sum(ranks) / inputs_seen if ranks else None,
    )


_Scores = tuple[np.ndarray, float | None]
"""Losses of the scored targets of a batch, and its effective rank times its inputs."""


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats per token of the text's own token frequencies: what ignoring all context reaches at best."""
    counts = np.bincount(ids)
    share = counts[counts > 0] / len(ids)
    return float(-(share * np.log(share)).sum())
