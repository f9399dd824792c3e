"""`phase1 perplexity`: train what is not trained yet, evaluate all on the same targets, compare."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from phase1.checks.perplexity import compared, quality_checks
from phase1.config import ModelShape, TrainConfig, content_id
from phase1.data import Corpus, load_corpus
from phase1.machine.environment import settings
from phase1.measure.perplexity.candidates import ScoredModel, candidates
from phase1.measure.perplexity.evaluate import Protocol
from phase1.measure.perplexity.result import ScoredText, measure, to_train
from phase1.measure.perplexity.side_by_side import train_side_by_side
from phase1.parallel import group
from phase1.parallel.run import visible_gpus
from phase1.plots import plot_losses, plot_perplexity
from phase1.records.schema import Check, PerplexityResult, Report, exit_code
from phase1.records.session import Session
from phase1.roster import Key, sources
from phase1.runs import PerplexityRun
from phase1.tables.console import checks_text, perplexity_text
from phase1.tables.screen import Screen, perplexity_numbers, text
from phase1.tables.screen import conditions as hardware
from phase1.text import without_private
from phase1.trainable import build
from phase1.training.checkpoint import read_index
from phase1.training.optimizers import described_groups
from phase1.training.step import windows_per_rank
from phase1.world import is_first

PLOT: Final = "phase1_perplexity_comparison.png"
LOSSES_PLOT: Final = "phase1_perplexity_losses.png"


def main(run: PerplexityRun) -> int:
    """Write the perplexity report and print it; see `PerplexityRun` for the flags."""
    models = candidates(run)
    own = {str(replace(Key.parse(model.key), seed=None)): model.config for model in models if model.config.model is not None}
    groups = "; ".join(f"{name}: {described_groups(build(config))}" for name, config in own.items())  # before any work
    need = ("valid",) if all(m.checkpoint for m in models) else ("train", "valid")
    corpora = group.first_before_others(lambda: corpora_of(run, need))
    texts = [text_of(run, corpus) for corpus in corpora]
    folders = folders_of(run, [one.corpus.name for one in texts])
    session = Session(run, "perplexity", data=data_identity(models, texts))
    if any(model.key not in session.journal and to_train(run, model, corpora[0]) for model in models):
        windows_per_rank(run, group.size())  # now, before one of them is trained and scored
    group.gate()  # until all ranks have read what is kept of an earlier run
    ready: Iterable[ScoredModel] = models
    if run.gpus:
        ready = train_side_by_side(run, models, corpora[0], gpus_of_this_run(run.gpus), done=session.journal)
    kept = {model.key: session.case(model.key, list[PerplexityResult], partial(measure, run, model, texts)) for model in ready}
    if not is_first():
        return 0
    checks = []
    for i, (scored, folder) in enumerate(zip(texts, folders, strict=True)):
        results = {model.key: kept[model.key][i] for model in models}
        checks += report_on(run, scored, results, folder, session, groups)
    session.close()
    return exit_code(checks)


def gpus_of_this_run(asked: tuple[str, ...]) -> list[str]:
    """The GPUs of --gpus, as CUDA_VISIBLE_DEVICES names them. ValueError for one that is not there, and under torchrun."""
    gpus = visible_gpus()
    wanted = range(max(1, len(gpus))) if asked == ("all",) else [int(gpu) for gpu in asked]
    if group.together() or max(wanted) >= len(gpus):
        got = f"{group.size()} ranks of torchrun" if group.together() else f"{len(gpus)} GPUs"
        raise ValueError(f"--gpus {' '.join(asked)} needs one process and the GPUs that it names; got {got}; leave it out")
    return [gpus[gpu] for gpu in wanted]


def corpora_of(run: PerplexityRun, need: tuple[str, ...]) -> list[Corpus]:
    """The text of the run, and those of --also-evaluate."""
    first = load_corpus(run, vocab_size=run.vocab_size, need=need, train_tokens=run.train_tokens)
    return [first, *further_texts(run, first)]


def further_texts(run: PerplexityRun, first: Corpus) -> Iterator[Corpus]:
    """The texts of --also-evaluate. Raises ValueError, before any training, if one has another tokenizer than the first."""
    for name in run.also_evaluate:
        corpus = load_corpus(replace(run, dataset_name=name), vocab_size=run.vocab_size, need=("valid",))
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ValueError(
                f"--also-evaluate {name} has another tokenizer than {first.name}; give --tokenizer gpt2 or a folder with one"
            )
        yield corpus


def text_of(run: PerplexityRun, corpus: Corpus) -> ScoredText:
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
    return ScoredText(corpus, protocol)


def folders_of(run: PerplexityRun, names: list[str]) -> list[Path]:
    """Where the report on each text goes: --out-dir, and for every further text a folder in it with the text's name.

    Raises ValueError where two texts have one name: the second report would replace the first.
    """
    plain = [re.sub(r"[^\w-]", "_", name) for name in names[1:]]
    if len(set(plain)) < len(plain):
        raise ValueError(f"--also-evaluate needs texts of different names; got {' '.join(plain)}; rename a folder")
    return [Path(run.out_dir), *(Path(run.out_dir) / name for name in plain)]


def report_on(
    run: PerplexityRun,
    scored: ScoredText,
    results: dict[str, PerplexityResult],
    folder: Path,
    session: Session,
    optimizer_groups: str,
) -> list[Check]:
    """Compare the models on one text, write the report and its plots into `folder`, and print the answer; its checks.

    optimizer_groups: of the user's own models, whose parameters may not be sorted as those of phase1's are.
    A run of given checkpoints that has no baseline compares nothing, and so judges nothing.
    """
    results = compared(results, run.seq_length)
    alone = bool(run.checkpoint) and not any(Key.parse(key).is_baseline for key in results)
    failed = any(result.status != "ok" for result in results.values())
    checks = [] if alone and not failed else quality_checks(results, run.seq_length)
    source = {"dataset_source": without_private(scored.corpus.source), "dataset_revision": scored.corpus.revision}
    source |= {"optimizer_groups": optimizer_groups} if optimizer_groups else {}
    plots = [(plot_losses, LOSSES_PLOT)] if any(result.status == "ok" for result in results.values()) else []
    plots += [(plot_perplexity, PLOT)] if len(results) > 1 else []
    warnings = list(dict.fromkeys(text for result in results.values() for text in result.otherwise))
    report, files = session.write(results, checks, plots, folder, run=conditions(run) | source, warnings=warnings)
    if run.verbose:
        print(perplexity_text(report), checks_text(checks), sep="\n")
    print(text(screen(report, scored.corpus.name, files)))
    return checks


def screen(report: Report[PerplexityResult], name: str, files: list[Path]) -> Screen:
    """What the report answers, and what to run next."""
    trained = {result.trained_tokens for result in report.results.values() if result.trained_tokens}
    tokens = ", ".join(f"{count:,}" for count in sorted(trained))
    after = f", after {tokens} tokens of training" if trained else ""
    return Screen(
        question=f"Quality on {name}: how well do the models predict it{after}? {hardware(report)}",
        numbers=perplexity_numbers(report),
        checks=report.checks,
        answer=None if report.checks else "no baseline in this run: nothing is compared, nothing judged",
        next=[f"phase1 tables --results-dir {files[0].parent}   tables of all reports in that folder"],
        files=files,
    )


def conditions(run: PerplexityRun) -> dict[str, Any]:
    """The settings of the evaluation. Those of training and model are in the results: a checkpoint has its own."""
    elsewhere = {f.name for cls in (ModelShape, TrainConfig) for f in fields(cls)} - {"precision"}
    return {name: value for name, value in settings(run).items() if name not in elsewhere}


def data_identity(models: list[ScoredModel], texts: list[ScoredText]) -> dict[str, str]:
    """What the cases of a run depend on besides its settings: tokens, tokenizer and given checkpoints, by their hashes."""
    first = texts[0].corpus
    identity = {name: split.sha256 for name, split in first.splits.items()} | {"tokenizer": first.tokenizer.fingerprint}
    identity |= {f"also_evaluate {text.corpus.name}": text.corpus.splits["valid"].sha256 for text in texts[1:]}
    identity |= sources({model.key: model.config for model in models}) or {}
    return identity | {model.key: content_id(read_index(model.checkpoint)) for model in models if model.checkpoint}
