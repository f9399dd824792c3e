"""One case of a perplexity run: a model, trained if necessary, and its score on every text."""

import hashlib
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from phase1.advice import smaller
from phase1.config import TrainConfig, content_id, part_of
from phase1.data import Corpus, Tokenizer, count_words
from phase1.data.tokenizer_files import TOKENIZER
from phase1.device import device_type
from phase1.errors import Diverged, is_out_of_memory, reason
from phase1.measure.perplexity.candidates import ScoredModel
from phase1.measure.perplexity.evaluate import LARGEST_NATS, Evaluation, Protocol, evaluate, unigram_entropy
from phase1.measure.perplexity.loss_parts import loss_by_band, loss_by_position, order_sha256
from phase1.measure.soundness.check import Unsound, require_sound
from phase1.ops.card import runs_kernels
from phase1.ops.self_check import failed_kernels
from phase1.parallel import group
from phase1.records.schema import Dataset, Parameters, PerplexityResult, Status
from phase1.roster import Key
from phase1.runs import PerplexityRun
from phase1.training.checkpoint import INDEX, NO_DIFFERENCE, load_model, load_token_order, read_index, training_facts
from phase1.training.job import train_to_checkpoint
from phase1.training.step import compute_dtype

BYTES_PER_WORD: Final = 40  # a text of longer words has no white space between them; Malayalam's average is below 30


class ScoredText(NamedTuple):
    """A text that models are scored on, and the protocol."""

    corpus: Corpus
    protocol: Protocol


def measure(run: PerplexityRun, model: ScoredModel, texts: list[ScoredText]) -> list[PerplexityResult]:
    """Train `model` if necessary and score it on every text; out of memory and divergence are results too."""
    try:
        folder = model.checkpoint or train_model(run, model, texts[0].corpus)
        return [evaluate_checkpoint(run, model, folder, text) for text in texts]
    except Diverged as error:
        return [without_number(model, "error", str(error)) for _ in texts]
    except Exception as error:
        if group.together():  # the other ranks are in the middle of a step
            raise
        if isinstance(error, Unsound):
            return [without_number(model, "error", str(error), error.why) for _ in texts]
        if model.config.model is not None and not is_out_of_memory(error):  # of a user's model, whose faults are its own
            traceback.print_exception(error)
            return [without_number(model, "error", f"{type(error).__name__}: {reason(error)}") for _ in texts]
        if not is_out_of_memory(error):
            raise
        ladder = smaller(
            batch=("--micro-batch-size", run.micro_batch_size),
            more=(f"--batch-size {max(1, run.batch_size // 2)}", "a smaller --seq-length"),
        )
        return [without_number(model, "oom", f"{reason(error)}; {ladder}") for _ in texts]


def to_train(run: PerplexityRun, model: ScoredModel, corpus: Corpus) -> bool:
    """Whether `model` is not given and no earlier run has trained it to the end."""
    if model.checkpoint is not None:
        return False
    folder, _ = training_of(run, model, corpus)
    return not ((folder / INDEX).exists() and read_index(folder)["facts"].get("finished"))


def train_model(run: PerplexityRun, model: ScoredModel, corpus: Corpus) -> Path:
    """Train `model`, or find it trained by an earlier run on the same config and data; its checkpoint folder."""
    folder, train_config = training_of(run, model, corpus)
    train_to_checkpoint(model.config, train_config, corpus, run.seq_length, folder, label=model.key)
    return folder


def training_of(run: PerplexityRun, model: ScoredModel, corpus: Corpus) -> tuple[Path, TrainConfig]:
    """Where `model` is when it is trained, by all that decides its training; and how it is trained."""
    train_config = replace(part_of(TrainConfig, run), seed=model.seed)
    plain = model.config.mixer == "attention" and not model.config.attention_qk_norm
    if plain if model.config.model is None else Key.parse(model.key).name == "baseline":
        train_config = replace(train_config, learning_rate=run.baseline_learning_rate)
    train = asdict(train_config) | NO_DIFFERENCE
    del train["piece_length"]  # younger than trainings that are there
    identity = {
        "model": model.config.config_id,
        "train": train,
        "seq_length": run.seq_length,
        "tokens": corpus.splits["train"].sha256,
        "tokenizer": corpus.tokenizer.fingerprint,
    }
    return Path(run.checkpoint_dir) / f"{model.key}-{content_id(identity)}", train_config


def evaluate_checkpoint(run: PerplexityRun, scored_model: ScoredModel, folder: Path, text: ScoredText) -> PerplexityResult:
    """Score the model in `folder`; perplexities of a model below the unigram entropy are marked untrained."""
    corpus, protocol = text
    index = read_index(folder)
    training_facts(folder, index)
    key, (model, facts) = scored_model.key, load_model(folder, scored_model.config.model)  # a training may have saved again
    device = device_type()
    scored = corpus.splits["valid"]
    if facts["tokenizer"] != corpus.tokenizer.fingerprint:
        remedy = f"give --tokenizer {folder}" if (folder / TOKENIZER).is_file() else "train again with this one"
        raise ValueError(f"{folder} was trained with another tokenizer than {corpus.name} has now; {remedy}")
    dtype = compute_dtype(run.precision, device)
    if model.config.model is not None:
        require_sound(model.to(device), run.seq_length, dtype)
    sizes = {"batch_size": run.batch_size, "piece_length": run.piece_length}
    evaluation = evaluate(model.to(device), scored.ids, protocol, dtype=dtype, label=key, **sizes)  # type: ignore[arg-type]
    if not evaluation.loss <= LARGEST_NATS:
        raise Diverged(f"{folder} gives a loss of {evaluation.loss} nats; expected at most {LARGEST_NATS:.0f}; train again")
    ids = scored.ids[: len(evaluation.losses)]
    unigram = unigram_entropy(ids)  # of what is scored: a part of a text may be easier than all of it
    return PerplexityResult(
        model_name=key,
        config=asdict(model.config),
        config_id=model.config.config_id,
        status="ok",
        basis="measured",
        parameters=Parameters(**model.parameter_counts()),
        perplexity=evaluation.perplexity,
        avg_loss=evaluation.loss,
        token_count=len(ids),
        trained_tokens=facts["trained_tokens"],
        skipped_steps=facts.get("skipped_steps"),
        ended_by=facts.get("ended_by"),
        trained_seq_length=facts.get("seq_length"),
        train_seconds=facts["train_seconds"],
        trained_on=Dataset(**facts["data"]),
        training=index["train_config"],
        weights_sha256=weights_sha256(folder, index),
        kernels="triton" if runs_kernels(next(model.parameters()), dtype) else "torch",
        otherwise=failed_kernels(),
        dataset=Dataset(name=corpus.name, split=scored.name, sha256=scored.sha256),
        protocol_hash=protocol.protocol_hash,
        untrained=evaluation.loss >= unigram,
        unigram_loss=unigram,
        effective_rank=evaluation.effective_rank,
        window_nll_nats=evaluation.nll_nats.tolist(),
        window_tokens=evaluation.tokens.tolist(),
        loss_by_position=loss_by_position(evaluation),
        **per_byte_and_word(evaluation, corpus.tokenizer, ids),
        **bands(folder, evaluation, ids),
    )


def weights_sha256(folder: Path, index: dict[str, Any]) -> str:
    """The digest of the file of weights that the index of the checkpoint in `folder` names."""
    with (folder / index["files"]["model"]).open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()


def per_byte_and_word(evaluation: Evaluation, tokenizer: Tokenizer, ids: np.ndarray) -> dict[str, Any]:
    """The fields of the numbers per byte and per word, and the reason in place of one that the text does not have."""
    byte_count, words = int(tokenizer.token_bytes()[ids].sum()), word_count(tokenizer, ids)
    bits, perplexity, absent = evaluation.bits_per_byte(byte_count), evaluation.word_perplexity(words), {}
    if bits is None:
        absent["bits_per_byte"] = "the scored text has no byte"
    if byte_count > BYTES_PER_WORD * words or not words:
        perplexity = None
        absent["word_perplexity"] = f"the scored text has {words:,} words between white space for {byte_count:,} bytes"
    elif perplexity is None:
        absent["word_perplexity"] = "past the end of float64"
    numbers = {"byte_count": byte_count, "word_count": words, "bits_per_byte": bits, "word_perplexity": perplexity}
    return numbers | {"absent": absent}


def bands(folder: Path, evaluation: Evaluation, ids: np.ndarray) -> dict[str, Any]:
    """The fields of the losses by frequency, by the order that the checkpoint brings, or why there are none."""
    tensor = load_token_order(folder)
    if tensor is None:
        return {"loss_by_band_detail": "the checkpoint has no token order: unfinished, or of an earlier version; train again"}
    order = tensor.numpy()
    return {"loss_by_band": loss_by_band(evaluation, ids, order), "token_order_sha256": order_sha256(order)}


def word_count(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Words of every document by itself: end-of-text is scored, is no word, and parts the words on its two sides."""
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))
    return sum(count_words(tokenizer.decode(document)) for document in documents)


def without_number(model: ScoredModel, status: Status, detail: str, unsound: str = "") -> PerplexityResult:
    """The result of a model that cannot be scored, or may not, and why; the other models go on."""
    return PerplexityResult(
        model_name=model.key,
        config=asdict(model.config),
        config_id=model.config.config_id,
        status=status,
        basis="measured",
        detail=detail,
        unsound=unsound,
    )
