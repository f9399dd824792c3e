"""One case of a perplexity run: a model, trained where needed, and its score on every text."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from phase1.config import TrainConfig, content_id, part_of
from phase1.data import Corpus, count_words
from phase1.errors import Diverged, is_out_of_memory, reason
from phase1.measure.perplexity.candidates import Candidate
from phase1.measure.perplexity.evaluate import Evaluation, Protocol, evaluate, unigram_entropy
from phase1.measure.perplexity.loss_parts import loss_by_band, loss_by_position, order_sha256
from phase1.records.schema import Dataset, Parameters, PerplexityResult, Status
from phase1.runs import PerplexityRun
from phase1.training.checkpoint import load_model, load_token_order, read_index, training_facts
from phase1.training.job import train_to_checkpoint
from phase1.training.step import compute_dtype


class Text(NamedTuple):
    """What models are scored on, and how."""

    corpus: Corpus
    protocol: Protocol


def measure(run: PerplexityRun, model: Candidate, texts: list[Text]) -> list[PerplexityResult]:
    """One case: train `model` where needed, and score it on every text; running out of memory and diverging are results too."""
    try:
        folder = model.checkpoint or train_candidate(run, model, texts[0].corpus)
        return [evaluate_checkpoint(run, model.key, folder, text) for text in texts]
    except Diverged as error:
        return [without_number(model, "error", str(error)) for _ in texts]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sizes = f"--micro-batch-size {max(1, run.micro_batch_size // 2)} --batch-size {max(1, run.batch_size // 2)}"
        advice = f"{reason(error)}; try {sizes}, then a smaller --seq-length"
        return [without_number(model, "oom", advice) for _ in texts]


def train_candidate(run: PerplexityRun, model: Candidate, corpus: Corpus) -> Path:
    """Train `model`, or find it trained by an earlier run on the same config and data; its checkpoint folder."""
    train_config = replace(part_of(TrainConfig, run), seed=model.seed)
    if model.config.mixer == "attention":
        train_config = replace(train_config, learning_rate=run.baseline_learning_rate)
    identity = {
        "model": model.config.config_id,
        "train": asdict(train_config),
        "seq_length": run.seq_length,
        "tokens": corpus.splits["train"].sha256,
        "tokenizer": corpus.tokenizer.fingerprint,
    }
    folder = Path(run.checkpoint_dir) / f"{model.key}-{content_id(identity)}"
    train_to_checkpoint(model.config, train_config, corpus, run.seq_length, folder, label=model.key)
    return folder


def evaluate_checkpoint(run: PerplexityRun, key: str, folder: Path, text: Text) -> PerplexityResult:
    """Score the model in `folder`; perplexities of a model below the unigram entropy are marked untrained."""
    corpus, protocol = text
    model, facts = load_model(folder)
    facts = training_facts(folder, facts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scored = corpus.splits["valid"]
    if facts["tokenizer"] != corpus.tokenizer.fingerprint:
        raise ValueError(f"{folder} was trained with another tokenizer than {corpus.name} has now; train again with this one")
    evaluation = evaluate(
        model.to(device), scored.ids, protocol, batch_size=run.batch_size, dtype=compute_dtype(run.precision, device), label=key
    )
    if not math.isfinite(evaluation.loss):
        raise ValueError(f"{folder} gives a loss of {evaluation.loss}; expected a finite number; train again")
    ids = scored.ids[: len(evaluation.losses)]
    byte_count = int(corpus.tokenizer.token_bytes()[ids].sum())
    word_count = count_words(corpus.tokenizer.decode(without(ids, corpus.tokenizer.end_of_text)))
    unigram = unigram_entropy(scored.ids)
    return PerplexityResult(
        model_name=key,
        config=asdict(model.config),
        config_id=model.config.config_id,
        status="ok",
        measured="measured",
        parameters=Parameters(**model.parameter_counts()),
        perplexity=evaluation.perplexity,
        bits_per_byte=evaluation.bits_per_byte(byte_count),
        word_perplexity=evaluation.word_perplexity(word_count),
        avg_loss=evaluation.loss,
        token_count=len(ids),
        byte_count=byte_count,
        word_count=word_count,
        trained_tokens=facts["trained_tokens"],
        skipped_steps=facts.get("skipped_steps"),
        trained_seq_length=facts.get("seq_length"),
        train_seconds=facts["train_seconds"],
        trained_on=Dataset(**facts["data"]),
        training=read_index(folder)["train_config"],
        dataset=Dataset(name=corpus.name, split=scored.name, sha256=scored.sha256),
        protocol_hash=protocol.protocol_hash,
        untrained=evaluation.loss >= unigram,
        unigram_loss=unigram,
        effective_rank=evaluation.effective_rank,
        window_nll_nats=evaluation.nll_nats.tolist(),
        window_tokens=evaluation.tokens.tolist(),
        loss_by_position=loss_by_position(evaluation),
        **bands(folder, evaluation, ids),
    )


def bands(folder: Path, evaluation: Evaluation, ids: np.ndarray) -> dict[str, Any]:
    """The fields of the losses by frequency, by the order that the checkpoint brings, or why there are none."""
    tensor = load_token_order(folder)
    if tensor is None:
        return {"loss_by_band_detail": "the checkpoint has no token order: unfinished, or of an earlier version; train again"}
    order = tensor.numpy()
    return {"loss_by_band": loss_by_band(evaluation, ids, order), "token_order_sha256": order_sha256(order)}


def without(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """The text's tokens: marks between documents are scored, but are no words."""
    return ids[ids != end_of_text]


def without_number(model: Candidate, status: Status, detail: str) -> PerplexityResult:
    """The result of a model that cannot be scored, and why; the other models go on."""
    return PerplexityResult(
        model_name=model.key,
        config=asdict(model.config),
        config_id=model.config.config_id,
        status=status,
        measured="measured",
        detail=detail,
    )
