"""`phase1 perplexity`: train what is not trained yet, evaluate all on the same targets, compare."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from phase1.candidates import Candidate, candidates
from phase1.checkpoint import load_model, load_token_order, read_index, training_facts
from phase1.commands.train import train_to_checkpoint
from phase1.config import PerplexityRun, Shape, TrainConfig, content_id, part_of
from phase1.data import Corpus, count_words, load_corpus
from phase1.errors import Diverged
from phase1.journal import open_journal
from phase1.measure.degradation import compared, quality_checks
from phase1.measure.environment import current_command, environment, machine, settings, without_private
from phase1.measure.isolate import is_out_of_memory, reason
from phase1.measure.loss_parts import loss_by_band, loss_by_position, order_sha256
from phase1.measure.perplexity import Evaluation, Protocol, evaluate, unigram_entropy
from phase1.record import FILES, Check, Dataset, Parameters, PerplexityResult, Report, Status, exit_code, write_report
from phase1.report import checks_text, perplexity_text, plot_losses, plot_perplexity
from phase1.train import compute_dtype


def main(run: PerplexityRun) -> int:
    """Write the perplexity report and print it; see `PerplexityRun` for the flags."""
    models = candidates(run)
    need = ("valid",) if all(m.checkpoint for m in models) else ("train", "valid")
    corpus = load_corpus(run, vocab_size=run.vocab_size, need=need, train_tokens=run.train_tokens)
    texts = [text_of(run, text) for text in (corpus, *further_texts(run, corpus))]
    folders = folders_of(run, [text.corpus.name for text in texts])
    path = Path(run.out_dir) / FILES["perplexity"]
    journal = open_journal(path, settings(run), machine=machine(), resume=run.resume, data=data_identity(models, texts))
    kept = {model.key: journal.case(model.key, list[PerplexityResult], partial(measure, run, model, texts)) for model in models}
    checks = []
    for i, (text, folder) in enumerate(zip(texts, folders, strict=True)):
        checks += report_on(run, text, {key: results[i] for key, results in kept.items()}, folder)
    journal.close()  # last: until here --resume finds every case
    return exit_code(checks)


class Text(NamedTuple):
    """What models are scored on, and how."""

    corpus: Corpus
    protocol: Protocol


def further_texts(run: PerplexityRun, first: Corpus) -> Iterator[Corpus]:
    """Those of --also-evaluate. Raises ValueError, before anything is trained, where one has other tokens than the first."""
    for name in run.also_evaluate:
        corpus = load_corpus(replace(run, dataset_name=name), vocab_size=run.vocab_size, need=("valid",))
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ValueError(
                f"--also-evaluate {name} has another tokenizer than {first.name}; give --tokenizer gpt2 or a folder with one"
            )
        yield corpus


def text_of(run: PerplexityRun, corpus: Corpus) -> Text:
    """The validation split of `corpus`, with the protocol that `run` asks for."""
    scored = corpus.splits["valid"]
    protocol = Protocol(
        dataset_sha256=scored.sha256,
        tokenizer_sha256=corpus.tokenizer.fingerprint,
        split=scored.name,
        seq_length=run.seq_length,
        stride=run.stride or run.seq_length,
        prefix=corpus.tokenizer.end_of_text,
        max_windows=run.max_samples,
    )
    return Text(corpus, protocol)


def folders_of(run: PerplexityRun, names: list[str]) -> list[Path]:
    """Where the report on each text goes: --out-dir, and for every further text a folder in it with the text's name.

    Raises ValueError where two texts have one name: the second report would replace the first.
    """
    plain = [re.sub(r"[^\w-]", "_", name) for name in names[1:]]
    if len(set(plain)) < len(plain):
        raise ValueError(f"--also-evaluate needs texts of different names; got {' '.join(plain)}; rename a folder")
    return [Path(run.out_dir), *(Path(run.out_dir) / name for name in plain)]


def report_on(run: PerplexityRun, text: Text, results: dict[str, PerplexityResult], folder: Path) -> list[Check]:
    """Compare the models on one text, write the report and its plots into `folder`, and print it; its checks."""
    results = compared(results, run.seq_length)
    checks = quality_checks(results, run.seq_length)
    source = {"dataset_source": without_private(text.corpus.source), "dataset_revision": text.corpus.revision}
    report = Report[PerplexityResult](
        kind="perplexity",
        environment=environment(),
        command=current_command(),
        run=conditions(run) | source,
        results=results,
        checks=checks,
    )
    path = folder / FILES["perplexity"]
    write_report(report, path)
    written = [path]
    if any(result.status == "ok" for result in results.values()):
        written.append(plot_losses(report, path.with_name("phase1_perplexity_losses.png")))
    if len(results) > 1:
        written.append(plot_perplexity(report, path.with_name("phase1_perplexity_comparison.png")))
    print(perplexity_text(report), checks_text(checks), *(f"written: {p}" for p in written), sep="\n")
    return checks


def conditions(run: PerplexityRun) -> dict[str, Any]:
    """The settings of the evaluation. Those of training and model are in the results: a checkpoint has its own."""
    elsewhere = {f.name for cls in (Shape, TrainConfig) for f in fields(cls)} - {"precision"}
    return {name: value for name, value in settings(run).items() if name not in elsewhere}


def data_identity(models: list[Candidate], texts: list[Text]) -> dict[str, str]:
    """What the cases of a run depend on besides its settings: tokens, tokenizer and given checkpoints, by their hashes."""
    first = texts[0].corpus
    identity = {name: split.sha256 for name, split in first.splits.items()} | {"tokenizer": first.tokenizer.fingerprint}
    identity |= {f"also_evaluate {text.corpus.name}": text.corpus.splits["valid"].sha256 for text in texts[1:]}
    return identity | {model.key: content_id(read_index(model.checkpoint)) for model in models if model.checkpoint}


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
