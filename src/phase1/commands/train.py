"""`phase1 train`: one model, from text to checkpoint, resumed where an earlier run stopped."""

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from phase1.advice import HOURS, smaller
from phase1.config import DataConfig, ModelConfig, TrainConfig, flags, part_of, to_toml
from phase1.data import Corpus, NoSplit, check_names, load_corpus
from phase1.data.tokenizer_files import TOKENIZER
from phase1.device import device_type
from phase1.errors import Unavailable, is_out_of_memory, reason
from phase1.factory import pinned
from phase1.files import atomic_write
from phase1.generation import Decoder, Sampling, continuation, text_of
from phase1.machine.environment import amd_gpu, total_gpu_bytes
from phase1.measure.memory.case import MemoryCase
from phase1.measure.memory.estimate.estimate import estimate_memory
from phase1.measure.memory.measured import chip_of
from phase1.measure.perplexity.evaluate import Protocol, evaluate, target_count, unigram_entropy
from phase1.measure.throughput.efficiency import step_flops
from phase1.model import LanguageModel
from phase1.parallel import group
from phase1.plots import plot_training
from phase1.records.metrics import METRICS, PATIENCE, read_metrics, rows_of_last_text
from phase1.records.session import require_apart, require_files, require_writable
from phase1.roster import Key
from phase1.runs import GenerateRun, PerplexityRun, ReportRun, TrainRun
from phase1.tables.screen import Screen, text
from phase1.text import one_line, printable_name
from phase1.trainable import Trainable, parameter_count
from phase1.training.checkpoint import INDEX, read_index
from phase1.training.exported import is_exported
from phase1.training.job import BEST, context_of, train_to_checkpoint
from phase1.training.pieces import in_pieces
from phase1.training.progress import SAMPLES
from phase1.training.step import compute_dtype, precision, total_steps
from phase1.training.trackers import tracker
from phase1.training.watch import Watch
from phase1.world import is_first

PLOT = "training.png"
SETTINGS = "run.toml"  # a file that --config reads
SCORES = 20  # validation losses of a run, by default
SHARE = 500  # training tokens per token of a validation loss: all of them together cost about 1 % of the time
LEAST = 2048  # tokens of a validation loss
LAST_ROWS = 10  # of metrics.jsonl, whose mean loss the last screen has
SAMPLE_TOKENS = 40
MANY = 50  # epochs
UNKNOWN = "n/a"
UNDECIDED = 3  # the exit status of a training that has learnt nothing


def main(run: TrainRun) -> int:
    """Train one model as the flags say; the checkpoint goes to --out-dir, with metrics.jsonl and its plot."""
    folder = Path(run.out_dir)
    require_apart(run.out_dir, "--dataset-name", run.dataset_name)
    if is_exported(folder):
        expected = "--out-dir must hold no model for transformers"
        raise ValueError(f"{expected}; got {folder}, which has config.json; give a new folder")
    require_files(folder, (INDEX, METRICS, SETTINGS, PLOT, SAMPLES, TOKENIZER, f"{BEST}/{INDEX}"))
    require_writable(folder)
    if (folder / INDEX).exists():
        read_index(folder)  # one that is damaged is told now, and not after hours with the text
    context_of(run, run.seq_length, run.context_parallel)  # now, before there is a model
    if run.shard and not group.together():
        raise ValueError("--shard needs several GPUs; got one process; start it by torchrun, or leave it out")
    corpus, valid = group.first_before_others(lambda: _texts(run))
    model_config, train_config = part_of(ModelConfig, run), part_of(TrainConfig, run)
    if model_config.model is not None:
        model_config = replace(model_config, model=pinned(model_config.model))
    for line in plan(run, model_config, corpus, valid) if is_first() else ():
        print(one_line(line, 500), file=sys.stderr, flush=True)
    watch = watch_of(run, corpus, valid)
    try:
        configs = model_config, train_config
        how: dict[str, Any] = {"label": title(run, model_config), "watch": watch}
        how |= {"shard": run.shard, "context_parallel": run.context_parallel}
        how |= {"begins": lambda: atomic_write(folder / SETTINGS, to_toml(run).encode())}
        facts = train_to_checkpoint(*configs, corpus, run.seq_length, folder, **how)
    except KeyboardInterrupt:
        if is_first():
            with suppress(Exception):  # the end of a run that was interrupted costs nothing for a plot
                _plots(folder)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shorter = max(1, (run.piece_length or run.seq_length) // 4)
        less: tuple[str, ...] = (f"--piece-length {shorter}",) if in_pieces(model_config, shorter) else ()
        less = ("more GPUs",) if run.context_parallel else less
        length = None if less else ("--seq-length", run.seq_length)
        ladder = smaller(batch=("--micro-batch-size", run.micro_batch_size), length=length, more=less)
        raise Unavailable(f"{reason(error)}; {ladder}") from error
    if not is_first():
        return 0
    rows, plots = _plots(folder)
    print(text(screen(run, model_config, facts, rows, watch.unigram_loss, plots, valid)))
    if facts["loss"] > (guess := math.log(run.vocab_size)):
        worse = f"the last loss, {facts['loss']:.3f}, is worse than guessing, which is ln V = {guess:.3f}"
        print(f"phase1 train: {worse}; lower --learning-rate, or train on more tokens", file=sys.stderr)
        return UNDECIDED
    return 0


def _plots(folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The course of the training so far, and the plot of it, where it has one."""
    rows = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    return rows, [plot_training({folder.name: rows}, folder / PLOT)] if rows else []


def title(run: TrainRun, model: ModelConfig) -> str:
    """What the model is called in reports."""
    return run.own_model or str(Key.of(model))


def screen(
    run: TrainRun,
    model: ModelConfig,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    unigram: float | None,
    plots: list[Path],
    looked_at: Corpus | None = None,
) -> Screen:
    """How well the model predicts now, and what to do with it; `looked_at` has the valid split of its losses."""
    folder, own = Path(run.out_dir), run.model is None
    seconds, tokens = facts["train_seconds"], facts["trained_tokens"]
    numbers = [f"training text   loss {facts['loss']:.3f} in the last step{_mean_of_last(rows)}"]
    if (valid := _last(rows, "val_loss")) is not None:
        best = min(row["val_loss"] for row in rows_of_last_text(rows))
        reach = _last(rows, "unigram_loss") if unigram is None else unigram  # None where it was looked at earlier only
        known = UNKNOWN if reach is None else f"{reach:.3f}"
        numbers.append(f"valid text      loss {valid:.3f}, best {best:.3f}; {known} is what token frequencies alone reach")
        if reach is not None and valid > reach:
            length = LEAST if looked_at is None else len(looked_at.splits["valid"].ids)
            few = f"the valid text is too short to judge by: {length:,} tokens, not {LEAST:,} or more"
            numbers.append(" " * 16 + (few if length < LEAST else "it has not beaten them: more --train-tokens"))
    if seconds:
        numbers.append(f"speed           {tokens / seconds:,.0f} tokens/s, {seconds:,.0f} s in all")
    if skipped := facts.get("skipped_steps"):
        numbers.append(f"of these steps {skipped} changed nothing: their gradients overflowed, and the loss scale was lowered")
    answer = f"trained on {tokens:,} tokens"
    if facts.get("ended_by") == PATIENCE:
        looks = f"no lower loss on the valid text in {run.patience} looks (--patience)"
        answer = f"ended after {tokens:,} tokens: {looks}; the same command with more of them goes on"
    elif not facts["finished"]:
        hours = f"--max-hours {run.max_hours:g} are over"
        answer = f"paused after {tokens:,} tokens: {hours}; the same command with more of them goes on"
    return Screen(
        question=f"Training of {title(run, model)} on {facts['data']['name']}: how well does it predict?",
        numbers=numbers,
        answer=answer,
        next=[
            *([f"phase1 generate {flags(GenerateRun(checkpoint=run.out_dir))}".rstrip() + "   text from it"] if own else []),
            _evaluation(run, model, looked_at),
            f"phase1 report {flags(ReportRun(results_dir=run.out_dir))}   its course on one page",
        ],
        files=[folder / INDEX, *(path for path in (folder / BEST / INDEX, folder / METRICS) if path.exists()), *plots],
    )


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    """The last known value of a column."""
    return next((row[name] for row in reversed(rows) if row[name] is not None), None)


def _mean_of_last(rows: list[dict[str, Any]]) -> str:
    """The mean loss of the steps of the last LAST_ROWS rows, and how many steps they are; nothing where one is not finite."""
    starts = [0, *(row["step"] for row in rows)]
    last = [(row["step"] - start, row["loss"]) for start, row in zip(starts, rows)][-LAST_ROWS:]
    if not last or any(loss is None for _, loss in last):
        return ""
    steps = sum(count for count, _ in last)
    return f", mean of the last {steps:,} steps {sum(count * loss for count, loss in last) / steps:.3f}"


def _texts(run: TrainRun) -> tuple[Corpus, Corpus | None]:
    """What is trained on, and the valid split where it is looked at."""
    corpus = load_corpus(run, vocab_size=run.vocab_size, need=("train",), train_tokens=run.train_tokens)
    return corpus, _valid(run)


def _valid(run: TrainRun) -> Corpus | None:
    """The valid split, or None, with a note, where there is none and none was asked for."""
    if run.eval_every == 0:
        return None
    try:
        return load_corpus(run, vocab_size=run.vocab_size, need=("valid",))
    except (NoSplit, Unavailable) as error:
        if run.eval_every is not None or run.keep_best or run.patience is not None:
            raise
        print(one_line(f"no loss on a valid split during the training: {error}", 500), file=sys.stderr)
        return None


def plan(run: TrainRun, model: ModelConfig, corpus: Corpus, valid: Corpus | None) -> list[str]:
    """What will happen, before it does: sizes, work, precision and why, memory, and whether that can fit."""
    steps, tokens = total_steps(run, run.seq_length), run.train_batch_size * run.seq_length
    parameters = parameter_count(model)
    windows = max(1, (len(corpus.splits["train"].ids) - 1) // run.seq_length)
    work = 0 if run.model is not None else steps * flops_of(run, model)
    flops = f"; {work:.2e} FLOPs" if work else ""
    device = device_type()
    epochs = steps * run.train_batch_size / windows
    lines = [
        f"{title(run, model)}: {parameters:,} parameters; {steps:,} steps of {tokens:,} tokens = {steps * tokens:,} tokens, "
        f"{epochs:.2f} epochs of {corpus.name}{flops}; {precision(run.precision, device)}"
    ]
    if device == "cpu" and work > HOURS:
        lines.append("that is hours or days on a CPU; --preset smoke trains a small model in minutes")
    if epochs > MANY:
        lines.append(f"it reads the text {epochs:,.0f} times, and will learn it by heart; lower --train-tokens, or add text")
    if run.context_parallel:
        lines.append(f"each of {group.size()} ranks takes {tokens_at_once(run):,} tokens of every sequence")
    if valid is not None:
        scored = target_count(valid.splits["valid"].ids, protocol_of(run, valid))
        lines.append(f"loss on {scored:,} tokens of the valid split every {_every(run)} steps")
    if device == "cuda" and run.model is None:
        size = min(run.micro_batch_size, run.train_batch_size), tokens_at_once(run)
        ranks = 1 if run.shard else group.size()
        case = MemoryCase(model, *size, piece_length=run.piece_length, optimizer=run.optimizer, ranks=ranks)
        needed, total = estimate_memory(case, chip_of(case)).needed_bytes, total_gpu_bytes()
        fits = total is None or needed <= total
        remedy = "" if fits else f"; it does not fit: try --micro-batch-size {max(1, case.batch_size // 2)}"
        by = " as on a card of NVIDIA" if amd_gpu() else ""
        lines.append(f"memory: {needed / 1e9:.2f} GB estimated{by}, of {(total or 0) / 1e9:.2f} GB{remedy}")
    return lines


def tokens_at_once(run: TrainRun) -> int:
    """Of a sequence, that one rank has."""
    return run.seq_length // group.size() if run.context_parallel else run.seq_length


def flops_of(run: TrainRun, model: ModelConfig) -> int:
    """Of one optimizer step."""
    flops = step_flops(model, min(run.micro_batch_size, run.train_batch_size), run.seq_length)
    return flops * math.ceil(run.train_batch_size / run.micro_batch_size)


def watch_of(run: TrainRun, corpus: Corpus, valid: Corpus | None) -> Watch:
    hours = math.inf if run.max_hours is None else run.max_hours
    return Watch(
        score=None if valid is None else scorer(run, valid),
        score_every=_every(run),
        unigram_loss=None if valid is None else _unigram_loss(run, valid),
        sample=sampler(run, corpus) if run.sample_every else None,
        sample_every=run.sample_every,
        max_seconds=3600 * hours,
        keep_best=run.keep_best,
        patience=run.patience,
        trackers=[tracker(name, Path(run.out_dir), asdict(run)) for name in run.report_to if is_first()],
    )


def _unigram_loss(run: TrainRun, valid: Corpus) -> float:
    """Of the tokens that are scored."""
    ids = valid.splits["valid"].ids
    return unigram_entropy(ids[: target_count(ids, protocol_of(run, valid))])


def _every(run: TrainRun) -> int:
    return max(1, total_steps(run, run.seq_length) // SCORES) if run.eval_every is None else run.eval_every


def _windows(run: TrainRun, valid: Corpus) -> int:
    tokens = max(LEAST, run.train_tokens // SHARE) if run.eval_tokens is None else run.eval_tokens
    return min(max(1, tokens // run.seq_length), math.ceil(len(valid.splits["valid"].ids) / run.seq_length))


def protocol_of(run: TrainRun, valid: Corpus) -> Protocol:
    """Windows side by side, from the beginning of the valid split."""
    split = valid.splits["valid"]
    return Protocol(
        dataset_sha256=split.sha256,
        tokenizer_sha256=valid.tokenizer.fingerprint,
        split=split.name,
        seq_length=run.seq_length,
        stride=run.seq_length,
        prefix=valid.tokenizer.end_of_text,
        max_windows=_windows(run, valid),
    )


def scorer(run: TrainRun, valid: Corpus) -> Callable[[Trainable], float]:
    """The loss that `phase1 perplexity --max-samples` finds on the first windows of the valid split."""
    split, protocol = valid.splits["valid"], protocol_of(run, valid)

    def score(model: Trainable) -> float:
        dtype = compute_dtype(run.precision, next(model.parameters()).device)
        at_once = {"batch_size": run.micro_batch_size, "piece_length": run.piece_length or tokens_at_once(run)}
        return evaluate(model, split.ids, protocol, dtype=dtype, label=None, **at_once).loss

    return score


def sampler(run: TrainRun, corpus: Corpus) -> Callable[[Trainable], str]:
    """A short text, by draws of its own: no random number of the training is used."""
    tokenizer, prompt = corpus.tokenizer, printable_name(run.prompt)  # which may be bytes that are no text

    def sample(model: Trainable) -> str:
        assert isinstance(model, LanguageModel)  # TrainRun allows no samples of others
        was_training = model.training
        try:
            decoder = Decoder(model, tokenizer)
            log_p, state = decoder.prefill([tokenizer.end_of_text, *tokenizer.encode(prompt)])
            ids = continuation(decoder, log_p, state, Sampling(0.8), max_tokens=SAMPLE_TOKENS, seed=run.seed)
            return prompt + "".join(text_of(ids, tokenizer))
        except ValueError as error:  # NaN: the training says so itself
            return f"({error})"
        finally:
            model.train(was_training)

    return sample


def _evaluation(run: TrainRun, model: ModelConfig, looked_at: Corpus | None) -> str:
    """What evaluates the model, or what has to be there first; `looked_at` has the valid split, if it was looked at."""
    folder, missing = Path(run.dataset_name), looked_at is None and run.eval_every != 0  # it was looked for, and is not there
    try:
        check_names(run, vocab_size=run.vocab_size, need=("valid",))
    except NoSplit:
        missing = True
    if not missing:
        return f"{next_command(run, model)}   its perplexity"
    if folder.is_dir():
        return f"put a valid.txt into {printable_name(str(folder))}, then: {next_command(run, model)}   its perplexity"
    return "phase1 perplexity needs a valid split, and this data set has none: give it another --dataset-name"


def next_command(run: TrainRun, model: ModelConfig) -> str:
    """What evaluates the model of `run`: same data and tokenizer, windows of the same length."""
    data = {f.name: getattr(run, f.name) for f in fields(DataConfig)}
    evaluation = PerplexityRun(
        **data,
        vocab_size=run.vocab_size,
        seq_length=run.seq_length,
        checkpoint=(f"{title(run, model)}={run.out_dir}",),
        model=() if run.model is None else (f"{title(run, model)}={run.model}",),
    )
    return f"phase1 perplexity {flags(evaluation)}"
